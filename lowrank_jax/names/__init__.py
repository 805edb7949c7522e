"""What Hugging Face calls the leaves of a parameter tree: a path <-> a module and its parameter.

Tables for the models of transformers: LLAMA, QWEN, GEMMA, GEMMA2 (and Gemma 3), GPT2, BERT, VIT
and VIT5. Any may stand where a function takes `names`.
"""

from lowrank_jax.names._bert import BERT as BERT
from lowrank_jax.names._gemma import GEMMA as GEMMA
from lowrank_jax.names._gemma import GEMMA2 as GEMMA2
from lowrank_jax.names._gpt2 import GPT2 as GPT2
from lowrank_jax.names._llama import LLAMA as LLAMA
from lowrank_jax.names._llama import QWEN as QWEN
from lowrank_jax.names._table import Names as Names
from lowrank_jax.names._table import Parameter as Parameter
from lowrank_jax.names._table import Table as Table
from lowrank_jax.names._table import parameter as parameter
from lowrank_jax.names._vit import VIT as VIT
from lowrank_jax.names._vit import VIT5 as VIT5
