"""What StreamsConfig accepts, and how it is written in config.json."""

import json
from typing import Any

import pytest

from parscale import InputError, StreamsConfig


def test_defaults_are_the_papers_method() -> None:
    assert StreamsConfig().to_json() == {"parscale_n": 4, "parscale_n_tokens": 48, "parscale_attn_smooth": 0.1}
    assert StreamsConfig().diversify == ("prefix",)
    assert StreamsConfig().aggregate == "learned"


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"streams": 0}, "streams=0"),
        ({"streams": -1}, "streams=-1"),
        ({"streams": True}, "streams=True"),
        ({"streams": "4"}, "streams='4'"),
        ({"streams": 2.0}, "streams=2.0"),
        ({"prefix_tokens": -1}, "prefix_tokens=-1"),
        ({"prefix_tokens": False}, "prefix_tokens=False"),
        ({"prefix_tokens": "48"}, "prefix_tokens='48'"),
        ({"smoothing": -0.1}, "smoothing=-0.1"),
        ({"smoothing": 1.1}, "smoothing=1.1"),
        ({"smoothing": float("nan")}, "smoothing=nan"),
        ({"smoothing": True}, "smoothing=True"),
        ({"smoothing": "0.1"}, "smoothing='0.1'"),
        ({"aggregate": "max"}, "aggregate='max'.*learned.*mean"),
        ({"aggregate": ["mean"]}, r"aggregate=\['mean'\]"),
        ({"head_init": "one"}, "head_init='one'.*zero.*random"),
        ({"prefix_scale": 0}, "prefix_scale=0"),
        ({"prefix_scale": float("inf")}, "prefix_scale=inf"),
        ({"prefix_scale": "1"}, "prefix_scale='1'"),
        ({"prefix_scale": 2.0, "prefix_init": "text"}, "prefix_scale=2.0 with prefix_init='text'.*'orthogonal'"),
        ({"prefix_init": "zeros"}, "prefix_init='zeros'.*normal"),
        ({"diversify": ("prefixes",)}, "diversify=.*prefixes.*embedding"),
        ({"diversify": ("prefix", "prefix")}, "diversify=.*distinct"),
        ({"diversify": 3}, "diversify=3"),
        ({"diversify": ([],)}, "diversify="),
    ],
)
def test_impossible_values_are_refused(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named) as caught:
        StreamsConfig(**settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("settings", [{"prefix_tokens": 0}, {"diversify": ()}])
def test_several_streams_need_something_to_tell_them_apart(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"nothing tells the streams apart.*prefix_tokens"):
        StreamsConfig(streams=2, **settings)
    assert StreamsConfig(streams=1, **settings).is_plain
    assert StreamsConfig(streams=2, prefix_tokens=0, diversify=("embedding",)).has_head


@pytest.mark.parametrize(
    "config",
    [
        StreamsConfig(),
        StreamsConfig(streams=1),
        StreamsConfig(streams=1, prefix_tokens=0),
        StreamsConfig(streams=8, prefix_tokens=5, smoothing=0.01, aggregate="mean", prefix_init="near_identity"),
        StreamsConfig(streams=2, prefix_tokens=0, diversify=("embedding",)),
        StreamsConfig(streams=2, diversify=("prefix", "embedding")),
        StreamsConfig(streams=2, prefix_scale=0.1, head_init="random"),
    ],
)
def test_json_round_trip(config: StreamsConfig) -> None:
    entries = json.loads(json.dumps(config.to_json()))
    assert StreamsConfig.from_json(entries) == config
    assert set(entries) <= {"parscale_n", "parscale_n_tokens", "parscale_attn_smooth", "parscale"}


def test_one_stream_of_the_released_format_has_no_prefix() -> None:
    """There `parscale_n: 1` means the plain model, whatever `parscale_n_tokens` says; the control says so itself."""
    released = {"parscale_n": 1, "parscale_n_tokens": 48, "parscale_attn_smooth": 0.01}
    assert StreamsConfig.from_json(released).is_plain
    control = StreamsConfig(streams=1).to_json()
    assert control["parscale"] == {"control": True}
    assert StreamsConfig.from_json(control).has_prefix


def test_unknown_keys_are_refused() -> None:
    with pytest.raises(InputError, match=r"unknown keys \['prefix_tokenz'\].*prefix_init"):
        StreamsConfig.from_json({"parscale_n": 2, "parscale": {"prefix_tokenz": 3}})


@pytest.mark.parametrize("entries", [{"parscale_n": "two"}, {"parscale_n": 0}, {"parscale_n": 2, "parscale": [1]}])
def test_values_of_a_wrong_kind_in_a_file_are_refused(entries: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        StreamsConfig.from_json(entries)
