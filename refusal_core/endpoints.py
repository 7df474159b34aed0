"""Chat models behind servers that speak the OpenAI protocol, such as vLLM: replies streamed side by side, and rates.

    GET  …/v1/models              which models a server has
    POST …/v1/chat/completions    a conversation; the reply comes as server-sent events, `choices[0].delta.content`

An export is an ordinary checkpoint, so two servers, of the unchanged model and of the export, carry what fits into no
process: any size, any number of users. They give text; what is inside the models only hooks can reach.

Nobody but the given servers is contacted, through no proxy, and no redirect is followed. A key goes to its own server
and is never shown.
"""

import argparse
import asyncio
import hashlib
import json
import os
import queue
import re
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2

from refusal_core.chat_model import Conversation, ModelError
from refusal_core.evaluation import Completion, Replies, Report, judged_replies, tally
from refusal_core.generation import Ending
from refusal_core.metrics import Rules
from refusal_core.prompts import PromptSet
from refusal_core.selection import Progress

KEY_VARIABLE = "OPENAI_API_KEY"
AT_ONCE = 32
"""How many replies are asked for at the same time: the server makes batches of them."""

CONNECTING, SILENCE = 10.0, 120.0
"""Seconds until a server must have taken a connection or named its models, and how long a reply may then stand still."""

LATENCY = 0.05
"""Seconds until a stop is seen."""

MOST_CHARACTERS = 100_000
MOST_SAID = 200
NO_THINKING = {"enable_thinking": False, "thinking": False}
"""As in `ChatModel`: a template that knows the switch has it off, the others' do not read it."""

NO_STREAM = "sent what is no stream of a chat completion: check the address, and its log."

ENDINGS: dict[str, Ending] = {"length": "length", "content_filter": "filtered"}
"""What a server says of an ending, where the model did not end the reply by itself."""

ROWS = ("unchanged", "direction removed")


class EndpointError(ModelError):
    """A server does not give what it was asked for; the message is one sentence with the remedy."""


@dataclass(frozen=True)
class Endpoint:
    """A server by its address, which ends in `/v1` as a rule, and one of its models; without a name, its only one."""

    url: str
    model: str = ""
    key: str = field(default="", repr=False)

    @classmethod
    def read(cls, url: str, model: str = "", key: str = "") -> "Endpoint":
        """The endpoint at `url` as somebody typed it; raises EndpointError for what is no address of a server."""
        try:
            parts = urlsplit(url.strip())
            httpx2.URL(url.strip())
            is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except (ValueError, httpx2.InvalidURL):  # a port that is no number, a bracket that is not closed
            parts, is_address = urlsplit(""), False
        if not is_address or parts.query or parts.fragment:
            raise EndpointError(f"{url[:80]!r} is no address of a server: give one such as http://localhost:8000/v1.")
        if "@" in parts.netloc:
            raise EndpointError(
                f"Leave the password out of the address of {parts.hostname}: a key comes from {KEY_VARIABLE}."
            )
        if not (key.isascii() and key.isprintable()):
            raise EndpointError("The key of a server has a character that cannot be sent: copy it anew.")
        return cls(f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/') or '/v1'}", model.strip(), key)

    @property
    def place(self) -> str:
        """Host and port, for sentences."""
        return urlsplit(self.url).netloc

    @property
    def named_place(self) -> str:
        """The model and where it is, for labels."""
        return f"{self.model or 'a model'} at {self.place}"

    def hidden(self, text: str) -> str:
        """What a server said, on one line, shortened, and without the key should it repeat that."""
        plain = " ".join((text.replace(self.key, "•••") if self.key else text).split())
        return plain if len(plain) <= MOST_SAID else plain[: MOST_SAID - 1] + "…"


@dataclass(frozen=True)
class Received:
    """A reply as far as it has come; `ending` is None while it goes on.

    `problem` says why a reply broke off that then is "stopped"; `n_tokens` is None where the server does not count.
    """

    text: str = ""
    ending: Ending | None = None
    n_tokens: int | None = None
    problem: str = ""


# -- replies ---------------------------------------------------------------------------------------------------------


def stream_replies(
    asked: Sequence[tuple[Endpoint, Conversation]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    at_once: int = AT_ONCE,
    stop: threading.Event | None = None,
) -> Iterator[tuple[int, Received]]:
    """Every reply, by its number, whenever there is more of it, and once with its ending; at most `at_once` grow at a time.

    One that cannot be had, or breaks off, says so as its `problem` and keeps its text; the others go on. Ends early when
    `stop` is set: the connections are closed, which frees the servers.
    """
    news: queue.SimpleQueue[tuple[int, Received] | None] = queue.SimpleQueue()
    left = threading.Event()
    sampling = {"temperature": temperature, "top_p": 1, "seed": seed, "max_tokens": max_new_tokens}

    async def ask(client: httpx2.AsyncClient) -> None:
        turn = asyncio.Semaphore(at_once)

        async def one(number: int, endpoint: Endpoint, conversation: Conversation) -> None:
            received = Received()
            async with turn:
                try:
                    async for received in _reply(client, endpoint, conversation, sampling):
                        news.put((number, received))
                except EndpointError as error:
                    news.put((number, replace(received, ending="stopped", problem=str(error))))

        async with asyncio.TaskGroup() as group:
            for number, (endpoint, conversation) in enumerate(asked):
                group.create_task(one(number, endpoint, conversation))

    def work() -> None:
        try:
            asyncio.run(_with_client(ask, left, stop))
        finally:
            news.put(None)

    with ThreadPoolExecutor(1, "endpoints") as pool:
        working = pool.submit(work)
        try:
            while (item := news.get()) is not None:
                yield item
        finally:
            left.set()
        working.result()


def named(endpoint: Endpoint, stop: threading.Event | None = None) -> Endpoint:
    """The same with the name of its model, asked of the server where it was not given; as it is if `stop` is set first.

    Raises EndpointError where the server cannot be asked, or has not exactly one model.
    """
    found: list[Endpoint] = []

    async def ask(client: httpx2.AsyncClient) -> None:
        found.append(await _named(client, endpoint))

    with ThreadPoolExecutor(1, "endpoints") as pool:  # a notebook has an event loop in this thread
        pool.submit(asyncio.run, _with_client(ask, stop)).result()
    return found[0] if found else endpoint


async def _with_client(ask: Callable[[httpx2.AsyncClient], Any], *stops: threading.Event | None) -> None:
    """Does `ask` until it is done, or until another thread has set one of `stops`."""
    timeout = httpx2.Timeout(SILENCE, connect=CONNECTING, pool=None)
    async with httpx2.AsyncClient(timeout=timeout, trust_env=False, follow_redirects=False) as client:
        task = asyncio.ensure_future(ask(client))
        while not any(stop is not None and stop.is_set() for stop in stops):
            if (await asyncio.wait({task}, timeout=LATENCY))[0]:
                break
        if not task.done():
            task.cancel()
            await asyncio.wait({task})
        if not task.cancelled():
            task.result()


async def _reply(
    client: httpx2.AsyncClient, endpoint: Endpoint, conversation: Conversation, sampling: Mapping[str, float]
) -> AsyncIterator[Received]:
    """The reply while it grows; raises EndpointError."""
    endpoint = await _named(client, endpoint)
    said = [{"role": "user", "content": conversation}] if isinstance(conversation, str) else list(conversation)
    if any(re.search("[\ud800-\udfff]", str(text)) for message in said for text in message.values()):
        raise EndpointError("The prompt has characters that are no text: type them anew.")
    body = {
        "model": endpoint.model,
        "messages": said,
        **sampling,
        "stream": True,
        "stream_options": {"include_usage": True},
        "chat_template_kwargs": NO_THINKING,
    }
    received = Received()
    ending: Ending | None = None
    try:
        async with client.stream(
            "POST", f"{endpoint.url}/chat/completions", json=body, headers=_headers(endpoint)
        ) as answer:
            await _check(endpoint, answer)
            async for event in httpx2.EventSource(answer):
                if event.data.strip() == "[DONE]":
                    break
                text, ended, n_tokens = _read_chunk(endpoint, event.data)
                ending = ended or ending
                received = replace(received, text=received.text + text, n_tokens=n_tokens or received.n_tokens)
                if len(received.text) > MOST_CHARACTERS:
                    raise EndpointError(
                        f"{_the(endpoint)} does not keep to the length that it was asked for: ended here."
                    )
                if text:
                    yield received
    except httpx2.RequestError as error:
        if ending is None:
            raise EndpointError(_sentence(endpoint, error, begun=bool(received.text))) from error
    if ending is None:
        raise EndpointError(f"{_the(endpoint)} stopped in the middle of the reply: ask again.")
    yield replace(received, ending=ending)


def _read_chunk(endpoint: Endpoint, data: str) -> tuple[str, Ending | None, int | None]:
    """The text, the ending and the number of tokens in one event of a stream."""
    try:
        chunk = json.loads(data)
        broken, usage, choices = chunk.get("error"), chunk.get("usage") or {}, chunk.get("choices") or []
        choice = choices[0] if choices else {"delta": {}}
        text, reason = choice["delta"].get("content") or "", choice.get("finish_reason")
        counted = usage.get("completion_tokens")
        is_chunk = isinstance(text, str) and isinstance(counted, int | None) and ("choices" in chunk or broken)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        is_chunk, broken, text, reason, counted = False, None, "", None, None
    if broken:
        raise EndpointError(_ended(f"{_the(endpoint)} broke the reply off: {endpoint.hidden(_words(broken))}"))
    if not is_chunk:
        raise EndpointError(f"{_the(endpoint)} {NO_STREAM}")
    # Half a pair of surrogates is no text: it could not be shown, nor kept in a file.
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text, None if reason is None else ENDINGS.get(str(reason), "end"), counted


async def _named(client: httpx2.AsyncClient, endpoint: Endpoint) -> Endpoint:
    if endpoint.model:
        return endpoint
    try:
        address = f"{endpoint.url}/models"
        async with client.stream("GET", address, headers=_headers(endpoint), timeout=CONNECTING) as answer:
            await _check(endpoint, answer)
            body = await _body(answer)
    except httpx2.RequestError as error:
        raise EndpointError(_sentence(endpoint, error, begun=False)) from error
    try:
        names = [str(entry["id"]) for entry in json.loads(body)["data"]]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise EndpointError(
            f"{_the(endpoint)} does not list its models as OpenAI’s does: check the address."
        ) from error
    if len(names) != 1:
        has = f"has {len(names)} models ({endpoint.hidden(', '.join(names))})" if names else "lists no model"
        raise EndpointError(
            f"{_the(endpoint)} {has}: start with --baseline-model or --ablated-model and the name of one."
        )
    return replace(endpoint, model=names[0])


def _headers(endpoint: Endpoint) -> dict[str, str]:
    return {"Authorization": f"Bearer {endpoint.key}"} if endpoint.key else {}


# -- what goes wrong -------------------------------------------------------------------------------------------------


def _the(endpoint: Endpoint) -> str:
    return f"The server at {endpoint.place}"


async def _check(endpoint: Endpoint, answer: httpx2.Response) -> None:
    """Raises EndpointError for an answer that is none."""
    status = answer.status_code
    if status == 200:
        return
    said = endpoint.hidden(_said(await _body(answer)))
    detail = f", and says: {said}" if said else ""
    if status in (401, 403):
        remedy = "does not accept the key" if endpoint.key else "asks for a key"
        sentence = f"{remedy} ({status}): put it into {KEY_VARIABLE}, or name another variable with --key-variable."
    elif status == 404:
        sentence = (
            f"does not know the address or the model {endpoint.hidden(endpoint.model)!r} (404): check both{detail}"
        )
    elif status == 429:
        sentence = f"is too busy (429): try again in a while{detail}"
    elif 300 <= status < 400:
        sentence = f"sends elsewhere ({status}), where nobody asked to go: start with the address that it means."
    elif status >= 500:
        sentence = f"failed ({status}): its log says why{detail}"
    else:
        sentence = f"does not take the request ({status}){detail or ': its log says why.'}"
    raise EndpointError(_ended(f"{_the(endpoint)} {sentence}"))


def _ended(sentence: str) -> str:
    return sentence if sentence.endswith((".", "…")) else f"{sentence}."


async def _body(answer: httpx2.Response) -> bytes:
    """The beginning of an answer, which may be endless."""
    body = b""
    async for part in answer.aiter_bytes():
        body += part
        if len(body) > MOST_CHARACTERS:
            break
    return body


def _said(body: bytes) -> str:
    try:
        return _words(json.loads(body))
    except (ValueError, RecursionError):
        return body.decode("utf-8", "replace")


def _words(said: Any) -> str:
    """The message in an error of a server: OpenAI nests it, FastAPI calls it detail."""
    for name in ("error", "message", "detail"):
        if isinstance(said, dict) and said.get(name):
            said = said[name]
    return said if isinstance(said, str) else json.dumps(said)


def _sentence(endpoint: Endpoint, error: httpx2.RequestError, *, begun: bool) -> str:
    if isinstance(error, httpx2.ConnectTimeout | httpx2.ConnectError):
        why = endpoint.hidden(str(error)) or f"no answer in {CONNECTING:.0f} s"
        return f"{_the(endpoint)} cannot be reached ({why}): start it, or check the address."
    if isinstance(error, httpx2.TimeoutException):
        return f"{_the(endpoint)} has not said anything in time: ask again when it is less busy."
    if isinstance(error, httpx2.SSEError):
        return f"{_the(endpoint)} {NO_STREAM}"
    where = "in the middle of the reply" if begun else "before it had answered"
    return f"{_the(endpoint)} closed the connection {where}: ask again; its log says why."


# -- rates -----------------------------------------------------------------------------------------------------------


def evaluate_endpoints(
    pair: tuple[Endpoint, Endpoint],
    prompts: PromptSet,
    *,
    rules: Rules = "paper",
    max_new_tokens: int = 64,
    resume: str | Path | None = None,
    stop: threading.Event | None = None,
) -> Iterator[Progress | Report]:
    """As `evaluate`, of the models behind two endpoints: unchanged, and with the direction removed.

    The distributions stay at the servers, so the rates have no KL. What is in the `resume` file is known again by the
    server's address, its model's name and the length: for other weights under the same name take a new file. Raises
    EndpointError for the first reply that cannot be had; what came before it is in that file.
    """
    pair = named(pair[0], stop), named(pair[1], stop)

    def complete(texts: Sequence[str], rows: Sequence[int]) -> Iterator[Replies]:
        asked = [(pair[row], text) for text, row in zip(texts, rows, strict=True)]
        for number, received in stream_replies(asked, max_new_tokens=max_new_tokens, stop=stop):
            if received.problem:
                raise EndpointError(received.problem)
            if received.ending:
                yield {number: (received.text, received.ending)}

    marks = [hashlib.sha256(f"{e.url} {e.model} {max_new_tokens}".encode()).hexdigest()[:16] for e in pair]
    for news in judged_replies(prompts, marks, complete, rules=rules, resume=resume):
        yield news if isinstance(news, Progress) else _report(pair, prompts, news, rules, max_new_tokens)


def _report(
    pair: tuple[Endpoint, Endpoint],
    prompts: PromptSet,
    completions: tuple[Completion, ...],
    rules: Rules,
    max_new_tokens: int,
) -> Report:
    return Report(
        model=" and ".join(e.named_place for e in pair),
        fingerprint="",
        revision=None,
        prompts=prompts.source,
        rules=rules,
        max_new_tokens=max_new_tokens,
        rates=tuple(
            tally(name, row, harmful, completions, None) for harmful in (True, False) for row, name in enumerate(ROWS)
        ),
        completions=completions,
    )


# -- command lines ---------------------------------------------------------------------------------------------------


def add_endpoints(parser: argparse.ArgumentParser) -> None:
    """The options of a command that can ask two servers instead of loading a model."""
    group = parser.add_argument_group(
        "servers", "instead of a model here: two that speak the OpenAI protocol, such as vLLM"
    )
    group.add_argument("--baseline", metavar="URL", help="serves the unchanged model: http://localhost:8000/v1")
    group.add_argument("--ablated", metavar="URL", help="serves the checkpoint that `export` wrote of it")
    group.add_argument("--baseline-model", metavar="NAME", default="", help="default: the only one the server lists")
    group.add_argument("--ablated-model", metavar="NAME", default="", help="default: the only one the server lists")
    group.add_argument(
        "--key-variable", metavar="NAME", help=f"environment variable with the servers' key; default: {KEY_VARIABLE}"
    )


def read_endpoints(options: argparse.Namespace) -> tuple[Endpoint, Endpoint] | None:
    """The two servers that a command line names, None if it names none; raises EndpointError for one alone."""
    named_here = (
        options.baseline,
        options.ablated,
        options.key_variable,
        options.baseline_model,
        options.ablated_model,
    )
    if not any(named_here):
        return None
    if not options.baseline or not options.ablated:
        raise EndpointError("--baseline and --ablated go together: give the addresses of both servers.")
    variable = options.key_variable or KEY_VARIABLE
    if options.key_variable and not os.environ.get(variable):
        raise EndpointError(f"The environment variable {variable} is not set: put the servers' key into it.")
    key = os.environ.get(variable, "").strip()
    return (
        Endpoint.read(options.baseline, options.baseline_model, key),
        Endpoint.read(options.ablated, options.ablated_model, key),
    )
