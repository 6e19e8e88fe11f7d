"""One vLLM engine in a process of its own: reads settings as JSON, prints what it generated as JSON.

python -m tests.vllm.engine '{"model": …, "prompts": [[…], …], "new": 24, "repeat": 1, "options": {…}, "reserve": true}'
"""

import json
import os
import sys
from typing import Any

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # else two processes want two NUMA nodes
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
DEFAULTS = {
    "dtype": "float32", "block_size": 16, "max_model_len": 256, "max_num_seqs": 8, "skip_tokenizer_init": True,
    "enforce_eager": True,
}  # fmt: skip


def main() -> None:
    settings = json.loads(sys.argv[1])
    options: dict[str, Any] = DEFAULTS | settings.get("options", {})
    if options.get("tensor_parallel_size", 1) == 1:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams, TokensPrompt

    if not settings.get("reserve", True):
        from parscale.serve import vllm_plugin

        vllm_plugin._take_first_blocks = lambda manager: None
    engine = LLM(settings["model"], **options)
    sampling = SamplingParams(temperature=0, max_tokens=settings["new"], logprobs=1, ignore_eos=True, detokenize=False)
    rounds = []
    for _ in range(settings.get("repeat", 1)):
        prompts = [TokensPrompt(prompt_token_ids=ids) for ids in settings["prompts"]]
        outputs = engine.generate(prompts, sampling, use_tqdm=False)
        rounds.append([_told(output) for output in outputs])
    told: dict[str, Any] = {"rounds": rounds}
    if options.get("tensor_parallel_size", 1) == 1:
        told["cache"] = _cache(engine, settings["prompts"][-1], sampling)
    print("RESULT " + json.dumps(told))


def _told(output: Any) -> dict[str, Any]:
    best = output.outputs[0]
    logprobs = [step[token].logprob for token, step in zip(best.token_ids, best.logprobs, strict=True)]
    return {"tokens": list(best.token_ids), "logprobs": logprobs, "cached": output.num_cached_tokens}


def _cache(engine: Any, prompt: list[int], sampling: Any) -> dict[str, int]:
    """Bytes of a block over all layers, and the blocks that one running request holds."""
    from vllm import TokensPrompt

    core = engine.llm_engine.engine_core.engine_core
    config = core.scheduler.kv_cache_config
    layers = sum(len(group.layer_names) for group in config.kv_cache_groups)
    page = config.kv_cache_groups[0].kv_cache_spec.page_size_bytes
    engine.llm_engine.add_request("one", TokensPrompt(prompt_token_ids=prompt), sampling)
    engine.llm_engine.step()
    (manager,) = core.scheduler.kv_cache_manager.coordinator.single_type_managers
    ((_, blocks),) = manager.req_to_blocks.items()
    held = len(blocks)
    while engine.llm_engine.has_unfinished_requests():
        engine.llm_engine.step()
    return {"bytes_per_block": page * layers, "blocks": held}


if __name__ == "__main__":
    main()
