"""`tensorgraph run`: generate text."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tensorgraph.errors import InputError
from tensorgraph.tools import options

if TYPE_CHECKING:
    from tensorgraph.device import Device
    from tensorgraph.models.text.generation import Generation
    from tensorgraph.models.text.model import Prompt, TextSession
    from tensorgraph.models.text.sampling import Sampler

CHECK = "Compare every node with this backend, such as reference, instead of generating."


def run(
    model: options.Model,
    prompt: Annotated[str | None, typer.Option("-p", "--prompt", help="Text to continue; - or nothing reads stdin.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put the text into the chat template; without a text, talk.")] = False,
    system: Annotated[str | None, typer.Option(help="What the system says first (with --chat).", metavar="TEXT")] = None,
    tokens: Annotated[int, typer.Option("-n", "--tokens", min=0, help="Generate at most this many tokens.")] = 256,
    temp: Annotated[float, typer.Option(help="Temperature; 0 always takes the likeliest token.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Draw from the K likeliest tokens; 0: from all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens that reach this probability.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Leave out tokens less likely than this part of the likeliest.")] = 0.0,
    repeat_penalty: Annotated[float, typer.Option(help="Make the last 64 tokens less likely; 1: do not.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="The same draws each time.", show_default=False)] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End at this text; may be repeated.", metavar="TEXT")] = None,
    ctx: Annotated[int | None, typer.Option(min=1, help="Most tokens of prompt and answer.", show_default="the model's")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Most tokens of a prompt evaluated in one step.")] = 512,
    threads: options.Threads = options.AUTO,
    backend: options.Backend = options.BACKEND,
    kv_type: options.KvType = "f16",
    exact: options.Exact = False,
    lowering: options.Lowering = None,
    packed_cache: options.PackedCache = False,
    gpu_layers: options.GpuLayers = options.AUTO,
    cpu_experts: options.CpuExperts = False,
    as_json: options.Json = False,
    stats: Annotated[bool, typer.Option("--stats", help="Also print plans, copies, code, threads, state and arena.")] = False,
    check: Annotated[str | None, typer.Option(help=CHECK, metavar="BACKEND")] = None,
    check_tokens: Annotated[int, typer.Option(min=1, help="With --check: most tokens of the prompt.")] = 16,
    check_steps: Annotated[int, typer.Option(min=0, help="With --check: steps of one token after them.")] = 2,
    check_folder: Annotated[Path, typer.Option(help="With --check: where wrong nodes are saved.")] = Path("tensorgraph-check"),
) -> None:
    """Generate text, as it comes; speeds go to stderr.

    With --check, generate nothing: compare the value of every node with that of a backend which is trusted, for the same
    inputs, and the steps as they are compiled; name the first node that is wrong, with its source line, and save it for
    `tensorgraph check-node`. Exit code 1 where one is.

    \b
    tensorgraph run smollm2 --chat -p "Why is the sky blue?" -n 64
    tensorgraph run model.gguf -p "Once upon a time" --temp 0.8 --top-p 0.95 --seed 1
    tensorgraph run smollm2 --chat
    echo "2 + 2 =" | tensorgraph run model.gguf --json
    tensorgraph run model.gguf -p "Once upon a time" --check reference
    """
    count = options.thread_count(threads)
    options.limit_threads(1 if check is not None and count == options.AUTO else count)  # several wait long on a busy machine
    from tensorgraph.compiler import CompileOptions
    from tensorgraph.models.text.model import load
    from tensorgraph.models.text.sampling import Sampler
    from tensorgraph.tools.lowerings import checked

    sampler = Sampler(temp, top_k, top_p, min_p, repeat_penalty, seed=seed)
    talks = chat and prompt is None and sys.stdin.isatty()
    if talks and as_json:
        raise InputError("[run] --json wants a prompt: -p TEXT, or a text on stdin")
    if check is not None and talks:
        raise InputError("[run] --check wants a prompt: -p TEXT, or a text on stdin")
    if prompt is None and not chat and sys.stdin.isatty():
        raise InputError("[run] wanted -p TEXT, --chat, or a text on stdin")
    if system is not None and not chat:
        raise InputError("[run] --system goes with --chat")
    before = [{"role": "system", "content": system}] if system is not None else []
    with options.working("loading"):
        chosen = CompileOptions(exact=exact, lowerings=tuple(lowering or ()))
        how = options.placed(backend, gpu_layers, cpu_experts, ctx, batch)
        loaded = load(model, kv_type=kv_type, options=chosen, threads=count, packed_cache=packed_cache, **how)
    with checked(loaded):
        if check is not None:
            from tensorgraph.tools.run_check import Wanted
            from tensorgraph.tools.run_check import check as check_model

            wanted = Wanted(check, check_tokens, check_steps, check_folder)
            check_model(loaded, _asked(prompt, before, chat), wanted, as_json=as_json)
            return
        with options.working("loading"):
            session = loaded.session(context=ctx, step_tokens=batch)
        with session:
            talk = Talk(session, sampler, tokens, stop or [], stats)
            if talks:
                talk.interactive(before)
                return
            answer = talk.answer(_asked(prompt, before, chat), silent=as_json)
            if as_json:
                counters = statistics(session) if stats else None
                typer.echo(json.dumps(as_object(answer.text, answer.generation) | ({"stats": counters} if counters else {})))


def _asked(prompt: str | None, before: list[dict[str, Any]], chat: bool) -> Prompt:
    """The text, of stdin where none was given, or the conversation that it ends."""
    text = options.stdin_text("run") if prompt is None or prompt == "-" else prompt
    return [*before, {"role": "user", "content": text}] if chat else text


@dataclasses.dataclass
class Answer:
    """A generation and all of its text."""

    generation: Generation
    text: str


@dataclasses.dataclass
class Talk:
    """A session with how its answers are to be generated and shown."""

    session: TextSession
    sampler: Sampler
    max_tokens: int
    stop: list[str]
    stats: bool

    def answer(self, prompt: Prompt, *, silent: bool = False) -> Answer:
        """Generate an answer; unless `silent`, show it as it comes and speeds at its end."""
        with options.working("reading the prompt"):
            generation = self.session.generate(prompt, max_tokens=self.max_tokens, sampler=self.sampler, stop=self.stop)
            pieces = [next(generation, "")]
        if not silent:
            _write(pieces[0])
        for piece in generation:
            pieces.append(piece)
            if not silent:
                _write(piece)
        if not silent:
            _write("\n")
            typer.echo(speeds(generation), err=True)
            if self.stats:
                typer.echo(_stats_text(statistics(self.session)), err=True)
        return Answer(generation, "".join(pieces))

    def interactive(self, messages: list[dict[str, Any]]) -> None:
        """Ask for one message after another, until the input ends; Ctrl-C ends an answer."""
        typer.echo("Ctrl-C ends an answer, Ctrl-D the conversation.", err=True)
        while True:
            try:
                text = input("> ")
            except EOFError:
                return
            messages.append({"role": "user", "content": text})
            try:
                messages.append({"role": "assistant", "content": self.answer(messages).text})
            except KeyboardInterrupt:
                _write("\n")
                messages.pop()


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def speeds(generation: Generation) -> str:
    """`37 prompt tokens at 6.1 t/s, 8 generated at 2.0 t/s, first after 6.07 s`."""
    return (
        f"{generation.prompt_tokens} prompt tokens at {generation.prompt_rate:.1f} t/s, {len(generation.ids)} generated at "
        f"{generation.decode_rate:.1f} t/s, first after {generation.first_text_s:.2f} s"
    )


def as_object(text: str, generation: Generation) -> dict[str, Any]:
    return {
        "text": text,
        "ids": generation.ids,
        "ended": generation.ended,
        "prompt_tokens": generation.prompt_tokens,
        "prompt_tokens_per_s": generation.prompt_rate,
        "tokens_per_s": generation.decode_rate,
        "first_token_s": generation.first_text_s,
    }


def statistics(session: TextSession) -> dict[str, Any]:
    """What the session's engine counted, and what its plan of a step is made of."""
    cache, counted = session.engine.cache, session.engine.stats
    counters = {"plans": len(cache), "hits": cache.hits + counted.prepared, "misses": cache.misses, "compile_s": cache.compile_s}
    steps = {"steps": counted.steps, "tokens": counted.tokens, "run_s": counted.run_s}
    plan = session.plan
    report = plan.report({name: dim.max for name, dim in plan.graph.dims.items()})
    return {
        **counters,
        **steps,
        "kernels": report.kernels,
        "splits": report.splits,
        "copies": report.copies,
        "copy_bytes": report.copy_bytes,
        "moved": [f"{node.op}: {wanted} -> {got}" for node, wanted, got in plan.scheduled.moved],
        "weight_bytes": report.weight_bytes,
        "state_bytes": session.state_bytes,
        "arena_bytes": dict(report.arena_bytes),
        "native": [found for device in session.engine.devices if (found := _native(device, session))],
    }


def _native(device: Device, session: TextSession) -> dict[str, Any]:
    """Of a device that runs native code: its kernels, its threads, and the calls of a step of one token; else nothing."""
    from tensorgraph.backends.cpu.device import CpuDevice
    from tensorgraph.extents import Extents
    from tensorgraph.tools.plan import step_dims

    if not isinstance(device, CpuDevice):
        return {}
    plan, dims = session.plan, step_dims(session.model.model, Extents(context=max(session.length, 1)), 1)
    active = plan.active(plan.choose(dims))
    splits = zip(plan.scheduled.splits, plan.groups, strict=True)
    groups = [g for split, groups in splits if split.device == device.name for g in groups if not active.isdisjoint(g.nodes)]
    calls = [call for group in groups for call in getattr(group, "calls", ()) if call.guard.holds(dims)]
    return {
        "device": device.name,
        "target": device.target.name,
        "threads": device.threads,
        "max_threads": device.code.executor.max_threads,
        **dataclasses.asdict(device.code.jit.stats),
        "decode_calls": len(calls),
    }


def _native_text(n: dict[str, Any]) -> str:
    code = f"{n['compiled']} kernels compiled in {n['compile_s']:.2f} s, {n['from_disk']} from disk"
    threads = f"threads {n['threads']}" + (f" ({n['max_threads']})" if n["threads"] == options.AUTO else "")
    return f"{n['device']} for {n['target']}: {code}, {n['decode_calls']} calls in a decode step, {threads}"


def _stats_text(s: dict[str, Any]) -> str:
    arena = ", ".join(f"{device} {options.size_text(n)}" for device, n in s["arena_bytes"].items())
    return "\n".join(
        (
            f"plans {s['plans']}: {s['misses']} compiled in {s['compile_s']:.2f} s, {s['hits']} cache hits",
            f"steps {s['steps']} of {s['tokens']} tokens in {s['run_s']:.2f} s",
            f"{s['kernels']} kernels, {s['splits']} splits, {s['copies']} copies of {options.size_text(s['copy_bytes'])}",
            *(f"moved {line}" for line in s["moved"]),
            *(_native_text(found) for found in s["native"]),
            f"state {options.size_text(s['state_bytes'])}, arena {arena}, weights {options.size_text(s['weight_bytes'])}",
        )
    )
