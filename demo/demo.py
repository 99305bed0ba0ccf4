"""The whole loop on this machine: train two adapters, push, promote, serve, compare, and replace one under load.

Runs the commands a user would type, and prints them. Owns only the story; every step is the project's own door.
"""

import argparse
import asyncio
import itertools
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from loraplex import AsyncClient, Client, Completion
from loraplex.errors import LoraplexError

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
HOME = ROOT / ".loraplex" / "demo"
TAGGER, SECOND = "quotes-tagger", "quotes-headline"
LONG_ANSWER = 200  # tokens of the stream that is still running when production moves
SAMPLES = 4  # held-out quotes asked of everyone
console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
steps = itertools.count(1)


def main() -> None:
    """Read the options, run the story, and stop cleanly on Ctrl-C."""
    options = argparse.ArgumentParser(prog="scripts/demo", description="Train, push, promote, serve, replace.")
    options.add_argument("--once", action="store_true", help="exit at the end instead of serving on")
    options.add_argument("--base", default="demo/base", help="any causal LM: a folder or a Hub id, such as "
                         "TinyLlama/TinyLlama-1.1B-Chat-v1.0 (default: the bundled demo base)")  # fmt: skip
    options.add_argument("--port", type=int, default=8000, help="port of the server (default: 8000)")
    chosen = options.parse_args()
    os.chdir(ROOT)
    os.environ["LORAPLEX_HOME"] = str(HOME)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is stopped
    console.print(f"To type the commands below yourself: export LORAPLEX_HOME={HOME} PATH={BIN}:$PATH", soft_wrap=True)
    try:
        story(chosen.base, chosen.port, chosen.once)
    except subprocess.CalledProcessError as error:
        sys.exit(f"error: the step above ended with exit code {error.returncode}")
    except LoraplexError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        console.print("\nstopped")
        sys.exit(130)


def story(base: str, port: int, once: bool) -> None:
    """The six steps of the demo, from top to bottom."""
    started = time.monotonic()
    check_port(port)
    shutil.rmtree(HOME, ignore_errors=True)  # the demo's own registry, and nothing else
    # The demo base is tiny and takes a high learning rate; a real one is trained as QLoRA's authors did.
    on_base = [] if base == "demo/base" else [f"base.model={base}", "training.learning_rate=2.0e-4"]

    title("Train two adapters on one 4-bit base")
    run("loraplex", "train", f"demo/{TAGGER}.yaml", *on_base)
    run("loraplex", "train", f"demo/{SECOND}.yaml", *on_base)

    title("Push them to the registry, and say what is in production")
    run("registry", "push", TAGGER)
    run("registry", "promote", f"{TAGGER}:1", "--to", "production")
    run("registry", "push", SECOND)
    run("registry", "list")

    title("Serve, and ask base and adapters the same prompts at once")
    with serving(base, port) as url:
        asyncio.run(compare(url))

        title("Train on to version 2, and move production to it while a stream runs")
        before = heldout_f1()
        run("loraplex", "train", f"demo/{TAGGER}-v2.yaml", *on_base)
        run("registry", "push", TAGGER)
        after = heldout_f1()
        console.print(f"held-out tag-F1: version 1 [bold]{before:.3f}[/], version 2 [bold]{after:.3f}[/]")
        replace_under_load(url, reason=f"held-out F1 {before:.3f}, then {after:.3f}")
        run("registry", "history", f"{TAGGER}@production")

        console.print(f"\n[bold]Done in {time.monotonic() - started:.0f} s.[/] The server is at [bold]{url}[/]. Try:\n")
        print_curls(url)
        if not once:
            console.print("Serving until Ctrl-C …")
            signal.pause()


def check_port(port: int) -> None:
    """End at once, and not after the trainings, when somebody listens there already."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            sys.exit(f"error: port {port} cannot be used ({error.strerror}); choose another with --port")


def title(text: str) -> None:
    """A numbered heading."""
    console.print(f"\n[bold cyan]{next(steps)}. {text}[/]")


def run(*command: str) -> None:
    """Print a command as a user would type it, and run it."""
    console.print(f"[bold]$ {escape(shlex.join(command))}[/]", soft_wrap=True)
    subprocess.run([str(BIN / command[0]), *command[1:]], check=True)


def receipt() -> dict[str, Any]:
    """What the trainer wrote beside the newest quotes-tagger."""
    return json.loads((ROOT / "adapters" / TAGGER / "receipt.json").read_text())


def heldout_f1() -> float:
    """Its score on quotes it never saw, answered by the engine that serves it."""
    return receipt()["metrics"]["tag_f1"]


@contextmanager
def serving(base: str, port: int) -> Iterator[str]:
    """The server, from ready to stopped."""
    command = ["loraplex", "serve", "--base", base, "--port", str(port)]
    console.print(f"[bold]$ {escape(' '.join(command))}[/]")
    server = subprocess.Popen([str(BIN / command[0]), *command[1:]])
    url = f"http://127.0.0.1:{port}"
    try:
        with Client(url, max_retries=0) as client:
            while not answers(client):
                if server.poll() is not None:
                    raise subprocess.CalledProcessError(server.returncode, command)
                time.sleep(0.2)
        yield url
    finally:
        server.terminate()  # not SIGINT: Ctrl-C has sent it one already, and a second one would cut it off
        server.wait()


def answers(client: Client) -> bool:
    """Whether the server is ready."""
    try:
        return client.ready()
    except ConnectionError:
        return False


def prompts() -> list[str]:
    """The first held-out quotes, as the adapters were trained to see them."""
    rows = (ROOT / "demo/quotes/heldout.jsonl").read_text().splitlines()
    return [f"{json.loads(row)['quote']} ->:" for row in rows[:SAMPLES]]


async def compare(url: str) -> None:
    """Ask everything at once and print it side by side."""
    asked = [(prompt, adapter) for prompt in prompts() for adapter in (None, f"{TAGGER}@production", SECOND)]

    async with AsyncClient(url) as client:

        async def ask(prompt: str, adapter: str | None) -> tuple[Completion, float]:
            began = time.perf_counter()
            answer = await client.complete(prompt, adapter=adapter, max_tokens=24, temperature=0)
            return answer, time.perf_counter() - began

        results = await asyncio.gather(*(ask(*each) for each in asked))

    table = Table("prompt", Column("adapter", no_wrap=True), "answer", "tokens", "seconds", "finish")
    for (prompt, _), (answer, seconds) in zip(asked, results, strict=True):
        tokens = str(answer.usage.completion_tokens if answer.usage else "?")
        who, said = answer.adapter or "base", escape(" ".join(answer.text.split()))
        first = escape(prompt) if answer.adapter is None else ""
        table.add_row(
            first, who, said, tokens, f"{seconds:.2f}", answer.finish_reason, end_section=who.startswith(SECOND)
        )
    console.print(table)


def replace_under_load(url: str, reason: str) -> None:
    """Move the alias while a long answer streams: it ends on version 1, the next one is version 2's."""
    prompt, alias = prompts()[0], f"{TAGGER}@production"
    with Client(url) as client:
        endless = {"logit_bias": {str(eos): -100 for eos in end_tokens()}, "temperature": 0, "max_tokens": LONG_ANSWER}
        chunks = client.stream(prompt, adapter=alias, **endless)
        first = next(chunks)
        console.print(f"a stream began on [bold]{first.adapter}[/]")
        versions, told = [first.adapter], threading.Event()

        def read_on() -> None:
            for chunk in chunks:
                versions.append(chunk.adapter)
            told.set()

        threading.Thread(target=read_on, daemon=True).start()
        run("registry", "promote", f"{TAGGER}:2", "--to", "production", "--reason", reason)
        still_running, before = not told.is_set(), len(versions)
        answer = client.complete(prompt, adapter=alias, temperature=0, max_tokens=24)
        console.print(f"a new request is answered by [bold]{answer.adapter}[/]:{escape(answer.text)}")
        told.wait()
    if set(versions) != {f"{TAGGER}:1"} or answer.adapter != f"{TAGGER}:2" or not still_running:
        raise SystemExit(f"error: the stream saw {set(versions)}, the new request {answer.adapter}")
    console.print(
        f"the stream had {before} pieces then, and ended after {len(versions)}, all of [bold]{versions[-1]}[/]"
    )


def end_tokens() -> Sequence[int]:
    """The ids that end an answer, so that the long stream can be told not to end."""
    folder = receipt()["base"].get("path")
    found = json.loads((Path(folder) / "config.json").read_text()).get("eos_token_id") if folder else None
    return found if isinstance(found, list) else [] if found is None else [found]


def print_curls(url: str) -> None:
    """Three commands to try."""
    body = json.dumps({"adapter": f"{TAGGER}@production", "prompt": prompts()[1], "max_tokens": 24, "temperature": 0})
    body = body.replace("'", "\\u0027")  # a quote that may hold an apostrophe, inside the shell's own
    for line in (
        f"curl -s {url}/v1/completions -H 'Content-Type: application/json' -d '{body}'",
        f"curl -s {url}/v1/models",
        f"curl -s {url}/metrics | grep '^lora_requests_total'",
    ):
        console.print(f"  {escape(line)}", soft_wrap=True)
    console.print()


if __name__ == "__main__":
    main()
