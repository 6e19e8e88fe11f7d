"""The cases of the contract suite: every family with its preferred attention; with the others, marked slow."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import parscale
from parscale import StreamsConfig
from tests.contract.families import FAMILIES, VOCABULARY, Family

P, N, B, T = 3, 5, 2, 9


@dataclass(frozen=True)
class Case:
    """One family with one attention implementation.

    Attributes:
        plain: the model without streams; not to be changed.
        model: P=3 streams with prefixes of 5; not to be changed.
    """

    family: Family
    backend: str
    plain: PreTrainedModel
    model: Any

    def build(self, **streams: Any) -> Any:
        """A model of one's own, in eval mode, with the given `StreamsConfig`."""
        model = self.family.build(self.backend)
        return parallelized(model, **streams)


def parallelized(model: PreTrainedModel, **streams: Any) -> Any:
    """Give streams, and what starts at zero or one far from it: weights of streams that differ by token and stream, and
    updates that make the streams differ.
    """
    torch.manual_seed(2)
    made: Any = parscale.parallelize(model, StreamsConfig(**{"streams": P, "prefix_tokens": N} | streams))
    head = made.base_model.aggregate_layer
    if head is not None:
        head[0].bias.data.normal_()
        head[2].weight.data.normal_(std=0.5)
        head[2].bias.data.normal_()
    for key, parameter in made.named_parameters():
        if key.endswith("stream_lora_b"):
            parameter.data.normal_(std=0.3)
        elif "stream_scale" in key:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return made


def unmapped(model: Any) -> Any:
    """A model from disk, in memory of torch's own. Tensors of a mapped file lie at any byte, and where they lie may
    decide in which order a mixture's products are summed: the last bit differs."""
    return copy.deepcopy(model)


@cache
def make_case(name: str, backend: str) -> Case:
    family = next(f for f in FAMILIES if f.name == name)
    plain = family.build(backend)
    return Case(family, backend, plain, parallelized(copy.deepcopy(plain)))


def _cases(chosen: Callable[[Family], bool], flex: bool) -> list[Any]:
    cases = []
    for family in filter(chosen, FAMILIES):
        for i, backend in enumerate(family.backends + (("flex_attention",) if flex and family.flex else ())):
            fast = i == 0 or (family.name, backend) == ("qwen2-sliding", "flex_attention")
            marks = [] if fast else [pytest.mark.slow]
            if backend == "flex_attention":  # torch and transformers warn of their own ways to build block masks
                marks.append(
                    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:flex_attention called without")
                )
            cases.append(pytest.param((family.name, backend), id=f"{family.name}-{backend}", marks=marks))
    return cases


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`case` runs on every family and backend; `trained_case` where gradients can flow; `moe_case` with a router."""
    for fixture, chosen, flex in (
        ("case", lambda f: True, True),
        ("trained_case", lambda f: True, False),
        ("moe_case", lambda f: f.moe, False),
    ):
        if fixture in metafunc.fixturenames:
            metafunc.parametrize(fixture, _cases(chosen, flex), indirect=True)


@pytest.fixture(scope="session", autouse=True)
def uncompiled_flex() -> Iterator[None]:
    """transformers compiles flex_attention on its own, half a minute a case: here it runs as written."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


@pytest.fixture
def case(request: pytest.FixtureRequest) -> Case:
    return make_case(*request.param)


trained_case = moe_case = case


@pytest.fixture
def ids() -> Tensor:
    """(B, T) token ids without special tokens."""
    return torch.randint(3, VOCABULARY, (B, T), generator=torch.Generator().manual_seed(3))
