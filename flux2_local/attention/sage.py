"""SageAttention: q and k in int8, the rest in fp16 or fp8. Lossy."""

from __future__ import annotations

from .backend import Backend, imported

BACKEND = Backend(
    "sage",
    # Its first version centres k in place, and every version takes misspelt options in silence.
    imported("sageattention", "sageattn", mutates=("k",), tensor_layout="NHD", is_causal=False),
    sms=(80, 86, 89, 90, 120),
    head_dims=(64, 96, 128),
    package="sageattention",
    get="pip install sageattention, or build version 2 from https://github.com/thu-ml/SageAttention",
    lossy=True,
)
