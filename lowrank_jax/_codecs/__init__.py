"""Blockwise codecs on bare arrays, bit for bit those of bitsandbytes."""

from lowrank_jax._codecs.blockwise import decode as decode
from lowrank_jax._codecs.blockwise import encode as encode
from lowrank_jax._codecs.blockwise import encode_flat as encode_flat
from lowrank_jax._codecs.blockwise import largest_magnitude as largest_magnitude
from lowrank_jax._codecs.blockwise import nan_unless as nan_unless
from lowrank_jax._codecs.blockwise import normalize_flat as normalize_flat
from lowrank_jax._codecs.blockwise import unit as unit
from lowrank_jax._codecs.formats import FORMATS as FORMATS
from lowrank_jax._codecs.formats import Format as Format
from lowrank_jax._codecs.formats import check_block_size as check_block_size
from lowrank_jax._codecs.formats import format_of as format_of
from lowrank_jax._codecs.formats import lookup as lookup
from lowrank_jax._codecs.formats import midpoints as midpoints
