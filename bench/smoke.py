"""Generated tokens per second of the engine on the demo base: alone and in company, base and adapters, against peft.

Every round runs every system once, in turn; ratios are taken round by round. Usage: scripts/bench smoke [--rounds N]
"""

# ruff: noqa: E402 - what dependencies say as they are imported is quieted first
import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from loraplex_server.engine.upstream import quiet

quiet()

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from report import Series, write

from loraplex_server.engine.config import EngineConfig
from loraplex_server.engine.engine import Engine
from loraplex_server.engine.model import Base, load_base
from loraplex_server.engine.request import SamplingParams

ROOT = Path(__file__).parents[1]
NEW_TOKENS = 48
REQUESTS = 8
ADAPTERS = 4
PROMPT = "A good friend will tell the truth before it is asked for. ->:"


def main() -> None:
    """Measure, print, write."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--base", default=str(ROOT / "demo/base"))
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        adapters = [make_adapter(chosen.base, Path(folder) / f"a{i}", seed=i) for i in range(ADAPTERS)]
        results = measure(systems(chosen.base, adapters), chosen.rounds)
    base_one, base_many = results["engine, base, 1"], results[f"engine, base, {REQUESTS}"]
    lines = [
        f"NF4 with double quantization; rank 16 on all linear layers; {NEW_TOKENS} new tokens a request, greedy; "
        f"{chosen.rounds} rounds, systems in turn; medians.",
        "",
        "| system, requests at once | tokens/s | to base, same number at once |",
        "|---|---|---|",
    ]
    for series in results.values():
        reference = base_one if series.name.endswith(" 1") else base_many
        lines.append(f"| {series.name} | {series.median:.0f} | {series.ratio(reference):.2f} |")
    path = write(
        "smoke", "Smoke: the demo base", lines, {"tokens_per_second": {n: s.values for n, s in results.items()}}
    )
    print("\n".join(lines))
    print(f"\nwritten to {path.relative_to(ROOT)}")


def make_adapter(base: str, folder: Path, seed: int) -> Path:
    """A random adapter: speed does not depend on what it says."""
    torch.manual_seed(seed)
    model = load_base(base, quantization="none", dtype="float32").model
    config = LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(model, config).save_pretrained(folder)
    return folder


def systems(base_path: str, folders: list[Path]) -> dict[str, Callable[[], int]]:
    """What is measured: name → run once and return the number of tokens generated."""
    engine = Engine(load_base(base_path), EngineConfig(max_loras=ADAPTERS))
    names = [folder.name for folder in folders]
    for name, folder in zip(names, folders, strict=True):
        engine.add_adapter(name, folder)
    never_ends = dict.fromkeys(engine.base.eos_token_ids, -100.0)
    params = SamplingParams(max_tokens=NEW_TOKENS, temperature=0, logit_bias=never_ends)

    def ours(adapters: list[str | None]) -> Callable[[], int]:
        return lambda: sum(len(c.token_ids) for c in engine.generate([PROMPT] * len(adapters), params, adapters))

    several: list[str | None] = [names[i % ADAPTERS] for i in range(REQUESTS)]
    peft_base = load_base(base_path)
    peft = PeftModel.from_pretrained(peft_base.model, folders[0], adapter_name=names[0])
    for name, folder in zip(names[1:], folders[1:], strict=True):
        peft.load_adapter(folder, name)
    peft.eval()
    return {
        "engine, base, 1": ours([None]),
        "engine, one adapter, 1": ours([names[0]]),
        "peft set_adapter + generate, one adapter, 1": lambda: switching(peft, peft_base, [names[0]]),
        f"engine, base, {REQUESTS}": ours([None] * REQUESTS),
        f"engine, one adapter, {REQUESTS}": ours([names[0]] * REQUESTS),
        f"engine, {ADAPTERS} adapters, {REQUESTS}": ours(several),
        f"peft set_adapter + generate, {ADAPTERS} adapters, {REQUESTS}": lambda: switching(peft, peft_base, several),
    }


@torch.no_grad()
def switching(model: PeftModel, base: Base, adapters: list[str | None]) -> int:
    """The plain way: one request after another, each after set_adapter."""
    ids = torch.tensor([base.tokenizer(PROMPT).input_ids], device=base.device)
    made = 0
    for adapter in adapters:
        model.set_adapter(adapter, inference_mode=True)
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=0,
        )
        made += out.shape[1] - ids.shape[1]
    return made


def measure(runs: dict[str, Callable[[], int]], rounds: int) -> dict[str, Series]:
    """Tokens per second of every system in every round, after one that does not count."""
    results = {name: Series(name, []) for name in runs}
    for round_number in range(rounds + 1):
        print(f"round {round_number} of {rounds}" + (" (warm-up)" if round_number == 0 else ""), flush=True)
        for name, run in runs.items():
            started = time.perf_counter()
            tokens = run()
            if round_number:
                results[name].values.append(tokens / (time.perf_counter() - started))
    return results


if __name__ == "__main__":
    main()
