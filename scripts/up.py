"""`headrace up`: everything on one machine, in one terminal."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Any

import click

from headrace.errors import HeadraceError
from headrace.scripts.options import CommandError, command, option
from headrace.scripts.shared import (
    GATEWAY_NEEDS,
    WORKERS_NEED,
    check_installed,
    client_endpoint_option,
    engine_config,
    engine_options,
    gateway_options,
    gateway_settings,
    model_argument,
    shutdown_option,
    worker_endpoint_option,
)
from headrace.scripts.terminal import Terminal

if TYPE_CHECKING:
    from headrace.client import Client
    from headrace.scripts.pool import Pool
    from headrace.scripts.running import Note

__all__ = ["up"]


@command(
    "up",
    "headrace up",
    "headrace up ./my-model --port 8080 --max-model-len 4096",
    'headrace up Qwen/Qwen2.5-0.5B-Instruct --prompt "Why is the sky blue?" --once',
    "HEADRACE_API_KEY=$(openssl rand -hex 16) headrace up --host 0.0.0.0",
)
@model_argument
@option("--prompt", heading="Prompt", metavar="TEXT", help="Answer this in the terminal as soon as the model is ready.")
@option(
    "--max-tokens",
    heading="Prompt",
    metavar="TOKENS",
    type=click.IntRange(min=1),
    default=512,
    help="Longest answer to --prompt.",
)
@option(
    "--once",
    heading="Prompt",
    is_flag=True,
    help="End after the answer, with code 0 only if text came; stdout gets the answer and nothing else.",
)
@engine_options
@gateway_options
@option("--no-gateway", heading="Network", is_flag=True, help="Neither HTTP API nor chat page; Python clients only.")
@client_endpoint_option
@worker_endpoint_option
@shutdown_option
def up(model: str | None, **values: Any) -> None:
    """Serve MODEL: start a broker, worker groups and a gateway, and look after them until Ctrl-C.

    MODEL is a folder, a Hugging Face id or a .gguf file; without it, a small instruction-tuned model is fetched. What
    dies is started again. Ctrl-C lets running answers finish, a second one does not.
    """
    if values["once"] and not values["prompt"]:
        raise CommandError("--once ends after the answer to a prompt; give one with --prompt.")
    plan_settings = _settings(values)
    # Child processes need no key but the gateway's, which goes there by another way.
    os.environ.pop("HEADRACE_API_KEY", None)
    from headrace.scripts.pool import Plan, Pool
    from headrace.scripts.running import sole_pool

    terminal = Terminal()
    plan = Plan(model=model, **plan_settings)
    with sole_pool() as note:
        greeter = _Greeter(
            terminal, note, prompt=values["prompt"], max_tokens=values["max_tokens"], once=values["once"]
        )
        code = Pool(plan, terminal, greeter).run()
    raise SystemExit(code)


def _settings(values: dict[str, Any]) -> dict[str, Any]:
    """The fields of a Plan, checked before anything is started."""
    from headrace import addresses

    check_installed(*WORKERS_NEED, *(() if values["no_gateway"] else GATEWAY_NEEDS))
    return {
        "name": values["served_model_name"],
        "config": engine_config(values),
        "client_endpoint": addresses.check_bind(values["endpoint"] or addresses.client_endpoint()),
        "worker_endpoint": addresses.check_bind(values["worker_endpoint"] or addresses.worker_endpoint()),
        "group_names": tuple(f"group-{number}" for number in range(values["groups"])),
        "tensor_parallel": values["tensor_parallel"],
        "threads": values["threads"],
        "gateway": None if values["no_gateway"] else gateway_settings(values),
        "grace": values["shutdown_timeout"],
        "engine": values["engine"],
    }


class _Greeter:
    """Says where everything is, then answers the prompt."""

    def __init__(self, terminal: Terminal, note: Note, *, prompt: str | None, max_tokens: int, once: bool) -> None:
        self._terminal = terminal
        self._note = note
        self._prompt = prompt
        self._max_tokens = max_tokens
        self._once = once
        self._client: Client | None = None
        self._stopped = threading.Event()

    def run(self, pool: Pool) -> int | None:
        """Greet; the exit code if the pool is to end."""
        from headrace.client import Client

        with Client(pool.client_endpoint) as client:
            self._client = client
            try:
                return self._greet(pool, client)
            except HeadraceError as error:
                if self._stopped.is_set():
                    return None
                if self._once:
                    raise
                what = "The pool runs, but" if self._prompt is None else "The prompt was not answered:"
                self._terminal.note(f"{what} {error.message}")
                return None

    def stop(self) -> None:
        """End an answer that is being written: whoever reads it asked for the end."""
        self._stopped.set()
        if self._client is not None:
            self._client.close()

    def _greet(self, pool: Pool, client: Client) -> int | None:
        from headrace.scripts.answer import stream_answer
        from headrace.scripts.greeting import find_card, has_chat, ready_block

        terminal = self._terminal
        card = find_card(client, pool.model)
        facts = {"model": card.name, "page": pool.page}
        self._note.add(**{name: value for name, value in facts.items() if value})
        # With --once, whatever reads stdout wants the answer.
        tell = terminal.note if self._once else terminal.say
        gateway = pool.plan.gateway
        rows = ready_block(
            card,
            client.status(),
            page=pool.page,
            endpoint=pool.client_endpoint,
            needs_key=gateway is not None and bool(gateway.api_keys),
        )
        tell("")
        for name, value in rows + ([] if self._once else [("stop", "Ctrl-C")]):
            tell(f"  {terminal.paint(f'{name:<10}', 'bold')} {value}")
        tell("")
        if self._prompt is None:
            return None
        tell(f"{terminal.paint('>', 'cyan')} {self._prompt}")
        text = client.text(card.name)
        chat = [{"role": "user", "content": self._prompt}]
        ids = text.encode_chat(chat) if has_chat(card) else text.encode(self._prompt)
        room = max(1, card.max_model_len - len(ids))
        answer = stream_answer(
            client, terminal, token_ids=ids, model=card.name, settings={"max_tokens": min(self._max_tokens, room)}
        )
        tell(terminal.paint(answer.figures(), "dim"))
        if self._once:
            return 0 if answer.text.strip() else 1
        return None
