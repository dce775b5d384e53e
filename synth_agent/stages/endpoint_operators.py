"""Data-Juicer operators that ask an OpenAI-compatible service for text, many samples at a time.

Data-Juicer's own rewriting operators work on questions and answers of dialogues, send one request
after the other and keep the old text in silence when a request fails. These two work on captions,
keep the markers of picture and chunk end where they are, remember every reply, and fail by naming
the sample.

The address comes from the environment, never from a recipe: `SYNTH_ENDPOINT_URL`, such as
`http://127.0.0.1:8000/v1`, and `SYNTH_ENDPOINT_KEY` where the service wants one. Importing this
module registers the operators; plain `dj-process` takes it by `custom_operator_paths`.
"""
# Annotations stay objects, not strings: Data-Juicer checks a recipe's values against them.

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from data_juicer.ops.base_op import OPERATORS, Mapper
from data_juicer.utils.mm_utils import SpecialTokens
from pydantic import Field, PositiveInt

URL_VARIABLE = "SYNTH_ENDPOINT_URL"
KEY_VARIABLE = "SYNTH_ENDPOINT_KEY"
REWRITING_PROMPT = (
    "Say this caption of a picture in other words. Keep every object, number, colour, place and "
    "word that is written in the picture; add nothing. Reply with the caption alone."
)
QUESTION_PROMPT = (
    "Write one question about a picture that this caption of it answers, and the answer. Ask only "
    "what the caption says. Reply with two lines: 'Question: ...' and 'Answer: ...'."
)
_QUESTION = re.compile(r"Question:\s*(\S.*?)\s+Answer:\s*(\S.*)", re.IGNORECASE | re.DOTALL)
_QUOTES = "\"'“”‘’"

_Samples = dict[str, list[Any]]


class EndpointFailed(Exception):
    """The service cannot be asked, or gave no usable reply for a sample."""


@dataclass(frozen=True)
class Request:
    """What decides a reply; its digest is the reply's name in the cache."""

    api_model: str
    prompt: str
    text: str
    max_tokens: int
    temperature: float
    seed: int

    @property
    def digest(self) -> str:
        """Return a hex digest of all fields."""
        document = json.dumps(vars(self), sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(document.encode()).hexdigest()


class ReplyCache:
    """Usable replies by request, one small file each; several processes may share the folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def get(self, request: Request) -> str | None:
        """Return the reply, None when there is none or its file is damaged."""
        try:
            reply = json.loads(self._path(request).read_text("utf-8"))["reply"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return reply if isinstance(reply, str) else None

    def put(self, request: Request, reply: str) -> None:
        """Remember a reply, completely or not at all."""
        path = self._path(request)
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".reply-")
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump({"reply": reply}, file, ensure_ascii=False)
        Path(name).replace(path)

    def _path(self, request: Request) -> Path:
        return self._folder / request.digest[:2] / f"{request.digest}.json"


class _EndpointMapper(Mapper):  # type: ignore[misc]
    """What both operators share: the markers, the requests and their failures."""

    _batched_op = True
    _default_prompt = ""

    def __init__(
        self,
        api_model: str = "",
        prompt: str | None = None,
        keep_original_sample: bool = False,
        max_tokens: PositiveInt = 256,
        temperature: Annotated[float, Field(ge=0)] = 0.7,
        seed: Annotated[int, Field(ge=0)] = 0,
        timeout_seconds: Annotated[float, Field(gt=0)] = 60.0,
        max_attempts: PositiveInt = 4,
        concurrency: PositiveInt = 8,
        cache_dir: str = "artifacts/cache/endpoint",
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Prepare requests; nothing is sent yet.

        :param api_model: name of the model as the service spells it
        :param prompt: what the model is told to do with a caption; None takes the operator's own
        :param keep_original_sample: whether each sample also stays as it was, before the made ones
        :param max_tokens: most tokens of a reply
        :param temperature: 0 takes the likeliest token, more draws more freely
        :param seed: passed on; an attempt after an unusable reply adds one to it
        :param timeout_seconds: longest wait for one reply
        :param max_attempts: requests for one text before its sample fails
        :param concurrency: requests under way at the same time
        :param cache_dir: folder of remembered replies, relative to where the program runs
        """
        super().__init__(*args, **kwargs)
        # Data-Juicer's parser cannot do with a parameter that has no default.
        if not api_model:
            raise ValueError("api_model is empty; give the model's name as the service spells it")
        self.api_model = api_model
        self.prompt = prompt or self._default_prompt
        self.keep_original_sample = keep_original_sample
        self.max_tokens = max_tokens
        self.temperature = temperature
        self.seed = seed
        self.timeout_seconds = timeout_seconds
        self.max_attempts = max_attempts
        self.concurrency = concurrency
        self.cache_dir = cache_dir

    def process_batched(self, samples: _Samples) -> _Samples:
        """Return the samples with new texts, after the old ones if those are kept.

        Raises:
            EndpointFailed: naming the first sample whose text got no usable reply.
        """
        texts = samples[self.text_key]
        asked: dict[str, int] = {}
        for row, text in enumerate(texts):
            for part in _captions(text):
                asked.setdefault(part, row)
        replies = self._replies(asked, samples)
        made = [_with_captions(text, replies) for text in texts]
        if not self.keep_original_sample:
            return {**samples, self.text_key: made}
        merged = {key: [*values, *values] for key, values in samples.items()}
        merged[self.text_key] = [*texts, *made]
        return merged

    def usable(self, caption: str, reply: str) -> str | None:
        """Return what stands in place of a caption, None when the reply is not usable."""
        raise NotImplementedError

    def _replies(self, asked: Mapping[str, int], samples: _Samples) -> dict[str, str]:
        """Return the new text of each caption; `asked` says which row needs it first."""
        ask = _client(self.timeout_seconds, self.max_attempts)
        cache = ReplyCache(Path(self.cache_dir))

        def reply(caption: str) -> str:
            try:
                return self._reply(caption, ask, cache)
            except EndpointFailed as error:
                row = asked[caption]
                name = samples["id"][row] if "id" in samples else f"in row {row} of its batch"
                raise EndpointFailed(f"sample {name}: {error}") from error

        with ThreadPoolExecutor(self.concurrency) as pool:
            futures = {caption: pool.submit(reply, caption) for caption in asked}
            try:
                return {caption: future.result() for caption, future in futures.items()}
            except EndpointFailed:
                # What is under way ends, and is remembered; what waits is not sent.
                pool.shutdown(cancel_futures=True)
                raise

    def _reply(self, caption: str, ask: Callable[[Request], str], cache: ReplyCache) -> str:
        said = ""
        for attempt in range(self.max_attempts):
            request = Request(
                self.api_model,
                self.prompt,
                caption,
                self.max_tokens,
                self.temperature,
                self.seed + attempt,
            )
            known = cache.get(request)
            said = ask(request) if known is None else known
            if known is None:
                cache.put(request, said)
            if made := self.usable(caption, _one_line(said)):
                return made
        raise EndpointFailed(
            f"{self.max_attempts} replies were not usable, the last one {said[:120]!r}"
        )


@OPERATORS.register_module("endpoint_rewriting_mapper")
class EndpointRewritingMapper(_EndpointMapper):
    """Says every caption in other words, by a language model behind an OpenAI-compatible service.

    Markers of picture and chunk end stay where they are. Captions leave the machine."""

    _default_prompt = REWRITING_PROMPT

    def usable(self, caption: str, reply: str) -> str | None:
        return reply.strip(_QUOTES).strip() or None


@OPERATORS.register_module("endpoint_question_mapper")
class EndpointQuestionMapper(_EndpointMapper):
    """Puts a question that a caption answers, and the answer, after the caption.

    A language model behind an OpenAI-compatible service writes both. Captions leave the machine."""

    _default_prompt = QUESTION_PROMPT

    def usable(self, caption: str, reply: str) -> str | None:
        found = _QUESTION.search(reply)
        return f"{caption} Question: {found[1]} Answer: {found[2]}" if found else None


def _client(timeout: float, max_attempts: int) -> Callable[[Request], str]:
    """Return a function that sends a request and returns the reply's text.

    It may be called from several threads. Refused connections, timeouts, overload and errors of the
    service are tried again after a growing pause.
    """
    url = os.environ.get(URL_VARIABLE)
    if not url:
        raise EndpointFailed(
            f"{URL_VARIABLE} is not set; give the service's address, such as "
            "http://127.0.0.1:8000/v1"
        )
    import openai

    key = os.environ.get(KEY_VARIABLE) or "none"
    client = openai.OpenAI(base_url=url, api_key=key, timeout=timeout, max_retries=max_attempts - 1)

    def ask(request: Request) -> str:
        try:
            answer = client.chat.completions.create(
                model=request.api_model,
                messages=[
                    {"role": "system", "content": request.prompt},
                    {"role": "user", "content": request.text},
                ],
                max_tokens=request.max_tokens,
                temperature=request.temperature,
                seed=request.seed,
            )
        except openai.OpenAIError as error:
            raise EndpointFailed(f"{type(error).__name__}: {error}") from error
        choices = answer.choices or []
        return (choices[0].message.content or "") if choices else ""

    return ask


def _captions(text: str) -> list[str]:
    """Return the parts of a text between its markers, without blanks around them."""
    return [part.strip() for part in _markers().split(text)[::2] if part.strip()]


def _with_captions(text: str, replies: Mapping[str, str]) -> str:
    """Return a text with each part between markers replaced; blanks around parts stay."""
    parts: Sequence[str] = _markers().split(text)
    made = []
    for position, part in enumerate(parts):
        caption = part.strip()
        is_marker = position % 2 == 1
        made.append(
            part if is_marker or not caption else part.replace(caption, replies[caption], 1)
        )
    return "".join(made)


def _one_line(reply: str) -> str:
    """Return a reply in one line and without markers, which would name pictures that are not there."""
    return " ".join(_markers().sub(" ", reply).split())


def _markers() -> re.Pattern[str]:
    # A recipe's options can change them between import and run.
    markers = (SpecialTokens.image, SpecialTokens.audio, SpecialTokens.video, SpecialTokens.eoc)
    return re.compile(f"({'|'.join(map(re.escape, markers))})")
