"""Tables that map paths of a parameter tree to Hugging Face's module and parameter names.

There is a table for each of these models of transformers: LLAMA, QWEN, GEMMA, GEMMA2 (also for
Gemma 3), GPT2, BERT, VIT and VIT5. Pass one as the `names` argument of a function.
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
