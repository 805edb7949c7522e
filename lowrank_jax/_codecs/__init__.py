"""Blockwise 4- and 8-bit codecs on plain arrays, bit-compatible with bitsandbytes."""

from lowrank_jax._codecs.blockwise import compute_absmax as compute_absmax
from lowrank_jax._codecs.blockwise import decode_blocks as decode_blocks
from lowrank_jax._codecs.blockwise import encode_blocks as encode_blocks
from lowrank_jax._codecs.blockwise import encode_flat as encode_flat
from lowrank_jax._codecs.blockwise import mask_with_nan as mask_with_nan
from lowrank_jax._codecs.blockwise import normalize_flat as normalize_flat
from lowrank_jax._codecs.blockwise import to_code_scale as to_code_scale
from lowrank_jax._codecs.formats import FORMATS as FORMATS
from lowrank_jax._codecs.formats import Format as Format
from lowrank_jax._codecs.formats import check_block_size as check_block_size
from lowrank_jax._codecs.formats import compute_midpoints as compute_midpoints
from lowrank_jax._codecs.formats import get_format as get_format
from lowrank_jax._codecs.formats import select_from_table as select_from_table
