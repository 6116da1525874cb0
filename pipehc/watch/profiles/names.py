"""Which GPU kernels communicate, by their names: a trace does not say it otherwise."""

from __future__ import annotations

import re
from functools import cache

# Looked for in a kernel's qualified name. Collectives are spelt in every way; that "small_gather" or a reduction over a block of
# threads has the same letters is what the lookbehinds are for.
_KNOWN = re.compile(
    "|".join(
        (
            r"(?i:nccl|rccl|msccl|nvshmem|rocshmem)",  # NCCL, RCCL, MSCCL, MSCCL++, NVSHMEM and what is built on it
            r"(?i:userbuffers)",  # TransformerEngine (and TensorRT-LLM's copy): userbuffers_fp16_sum_..., kuserbuffers_pushsend
            # DeepEP and its relatives (DeepSeek's own dpsk::ep, hybrid_ep, UCCL, MSCCL++, MORI): dispatch, combine, notify, ...
            r"(?i:(inter|intra)_?node.*(dispatch|combine|notify|barrier)|(dispatch|combine|notify).*(inter|intra)_?node)",
            r"(?i:(?<![a-z])(deep_?ep|dpsk::ep|hybrid_ep|uccl|pplx|mori)\b.*(dispatch|combine|notify|barrier|low_latency_buffer|device_sync))",
            r"(?i:a2a_?(dispatch|combine)|alltoallv?)",  # TensorRT-LLM, FlashInfer, pplx
            r"symmetric_memory|(?i:multimem)|(put|wait)_signal_kernel|exchangeSplitAndOffset|hybridCubeMesh",  # torch
            r"cross_device_|quick_?reduce|mnnvl",  # custom all-reduces of vLLM, SGLang, AITER, TensorRT-LLM, FlashInfer
            r"(?<![A-Za-z])(?:custom_?|lamport_?|(?:one|two)_?shot_?)?all_?(?:reduce|gather|to_?all|2_?all)",
            r"All_?(?:[Rr]educe|[Gg]ather|[Tt]o_?[Aa]ll|2_?[Aa]ll)",
            r"(?<![A-Za-z])reduce_?scatter|Reduce_?[Ss]catter|[Ss]end_?[Rr]ecv",
        )
    )
)
# Local work with such names: DeepEP's layout, permutation and epilogues, products that are fused with a collective, what inductor
# names after all operations it fused, reductions inside a device.
_LOCAL = re.compile(
    r"layout|permut|preprocess|epilogue|^triton_[a-z]+_fused|(?i:gemm|matmul)|(?i:(block|warp|wave|cta|thread|cluster|grid)_?all_?reduce)"
)
_ALWAYS = re.compile(r"(?i:nccl|rccl|msccl)")
_DOUBTFUL = re.compile(r"(?i:dispatch|combine|notify|barrier|peer|p2p|a2a|signal|sharp)|(?<![A-Za-z])(send|recv|comm)(?![a-z])")


@cache
def qualified(name: str) -> str:
    """A kernel's name without return type, templates and arguments: `void a::(anonymous namespace)::k<int>(float*)` is `a::k`."""
    text = re.sub(r"\(anonymous \w+\)::|<unnamed>::|->|\[clone [^]]*\]", "", name)
    kept, depth = [], 0
    for character in text:
        if character in "<(":
            depth += 1
        elif character in ">)":
            depth = max(0, depth - 1)
        elif not depth:
            kept.append(character)
    words = "".join(kept).split()
    # What is left before the name is a return type; copies ("Memcpy HtoD") have two words and none.
    return " ".join(words) if not words or words[0] in ("Memcpy", "Memset") else words[-1]


def short(name: str) -> str:
    return qualified(name)[:60] or name[:60]


@cache
def communicates(name: str, own: re.Pattern[str] | None = None) -> bool:
    """Whether the kernel is known to communicate, or its whole name matches `own`."""
    if own is not None and own.search(name):
        return True
    plain = qualified(name) or name
    return bool(_KNOWN.search(plain)) and (bool(_ALWAYS.search(plain)) or not _LOCAL.search(plain))


@cache
def doubtful(name: str) -> bool:
    """Whether the name of a kernel that is not known sounds like communication."""
    plain = qualified(name) or name
    return bool(_DOUBTFUL.search(plain)) and not _LOCAL.search(plain) and "split" not in plain
