"""The suites: which cases each one has, and which of them, and of their providers, a run takes."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from tinybert_fast.benchmarks.case import Case, Cases

SUITES = ("step", "ops", "memory", "masking", "inference", "scaling")


def load_cases(suite: str, *, on_gpu: bool = False) -> Cases:
    """Name -> builder of every case of a suite. Training steps are larger on a GPU."""
    if suite not in SUITES:
        raise ValueError(f"--suite {suite!r} is not one of {', '.join(SUITES)}")
    if suite == "ops":
        from tinybert_fast.benchmarks.cases import (
            attention,
            attention_relation_kl,
            attention_score_mse,
            bias_gelu,
            dropout_add_layer_norm,
            embedding_layer_norm,
            feed_forward_fp8,
            hidden_mse,
            layer_norm,
            linear_cross_entropy,
        )

        return {  # what matters most first: ``minutes`` cuts the end off
            **attention.CASES,
            **dropout_add_layer_norm.CASES,
            **attention_score_mse.CASES,
            **linear_cross_entropy.CASES,
            **attention.MORE_CASES,
            **hidden_mse.CASES,
            **layer_norm.CASES,
            **embedding_layer_norm.CASES,
            **attention_relation_kl.CASES,
            **bias_gelu.CASES,
            **(feed_forward_fp8.CASES if on_gpu else {}),
        }
    if suite == "memory":
        from tinybert_fast.benchmarks.cases import attention_score_mse_memory

        return attention_score_mse_memory.CASES
    if suite == "masking":
        from tinybert_fast.benchmarks.cases import masking

        return masking.CASES
    if suite == "inference":
        from tinybert_fast.benchmarks.cases import inference

        return inference.GPU_CASES if on_gpu else inference.CASES
    if suite == "scaling":
        from tinybert_fast.benchmarks.cases import scaling

        return scaling.GPU_CASES if on_gpu else scaling.CASES
    from tinybert_fast.benchmarks.cases import (
        distill_step,
        finetune_step,
        mlm_step,
        pretrain_step,
    )

    steps = [mlm_step, distill_step, pretrain_step, finetune_step]
    if on_gpu:  # where the clock cuts the end off, and masked LM compiles longest
        steps = [distill_step, mlm_step, pretrain_step, finetune_step]
    return {
        name: build
        for step in steps
        for name, build in (step.GPU_CASES if on_gpu else step.CASES).items()
    }


def selected(builders: Cases, wanted: Collection[str]) -> Cases:
    """Cases whose name begins with one of these; all, if there is none."""
    if isinstance(wanted, str):
        wanted = (wanted,)
    for begin in wanted:
        if not any(name.startswith(begin) for name in builders):
            raise ValueError(f"--case {begin!r} matches none of {', '.join(builders)}")
    return {
        name: build
        for name, build in builders.items()
        if not wanted or any(name.startswith(begin) for begin in wanted)
    }


def keep(case: Case, names: Collection[str]) -> None:
    """Leave these providers in a case, and those that its checks refer to."""
    if not any(provider.name in names for provider in case.providers):
        there = ", ".join(provider.name for provider in case.providers)
        asked = ", ".join(names)
        raise ValueError(f"--provider {asked}: {case.title} has none of them but {there}")
    kept = {*names, *(check.reference for check in case.checks)}
    case.providers = [p for p in case.providers if p.name in kept]
    case.checks = tuple(
        replace(check, others=tuple(name for name in check.others if name in kept))
        for check in case.checks
    )
