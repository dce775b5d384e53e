"""Captions of many images in one call of a model: BLIP-2 or LLaVA-1.5.

Data-Juicer's captioning mapper draws from the whole vocabulary, and works with BLIP-2 only, since it
overwrites the id of the image's token. The operator here takes the same parameters; importing
`operators.py` registers it.
"""
# Annotations stay objects, not strings: Data-Juicer checks a recipe's values against them.

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from data_juicer.ops.base_op import OPERATORS
from data_juicer.ops.mapper.image_captioning_mapper import ImageCaptioningMapper
from data_juicer.utils.mm_utils import SpecialTokens

from synth_agent.stages.model_calls import (
    CALLS_PER_BATCH_ON_GPU,
    DTYPES,
    Picture,
    Row,
    check_call_options,
    dtype_of,
    in_inference,
    joined,
    load_model,
    pictures_of,
    pixels_of,
    prepared,
    too_few_pictures,
)

_DTYPES = (*DTYPES, "auto")


@OPERATORS.register_module("batched_image_captioning_mapper", force=True)
class BatchedImageCaptioningMapper(ImageCaptioningMapper):  # type: ignore[misc]
    """Generates image captions with a BLIP-2 or LLaVA-1.5 model, many images at a time.

    Works like `image_captioning_mapper`, with a seed: the draws for a caption follow from the seed,
    the image, the sample's text and the image's place in it, so that the same seed and input give
    the same caption. The temperature, top_k and top_p of the model folder's generation_config.json
    are honoured, and only the tokens that top_k leaves are drawn from. The model's config.json says
    which of the two it is. LLaVA is asked `USER: <image>`, the prompt in a line of its own, and
    `ASSISTANT:`; the caption is what follows."""

    def __init__(
        self,
        *args: Any,
        images_per_call: int = 64,
        dtype: str = "float32",
        do_sample: bool = True,
        seed: int = 0,
        max_new_tokens: int = 128,
        **kwargs: Any,
    ) -> None:
        """
        Initialization method.

        :param args: parameters of image_captioning_mapper.
        :param images_per_call: the most images that the model captions in one call. It takes the
            place of gpu_batch_size.
        :param dtype: what the model computes in: 'float32', 'bfloat16', or 'auto' for bfloat16 on a
            GPU and float32 on a CPU.
        :param do_sample: draw the tokens, or take the most probable one each time.
        :param seed: seed of the draws.
        :param max_new_tokens: the most tokens of a caption.
        :param kwargs: parameters of image_captioning_mapper. LLaVA needs a prompt: the question
            alone, without the markers of speakers and image.
        """
        super().__init__(*args, **kwargs)
        check_call_options(self._name, "images_per_call", images_per_call, dtype, _DTYPES)
        if max_new_tokens < 1:
            raise ValueError(f"{self._name}: max_new_tokens is {max_new_tokens}, give 1 or more")
        self.images_per_call = self.gpu_batch_size = images_per_call
        self.dtype = dtype
        if dtype == "auto":
            self.dtype = "bfloat16" if self.use_cuda() else "float32"
        self.do_sample, self.seed, self.max_new_tokens = do_sample, seed, max_new_tokens
        # Candidates are alike in distribution, so a random one of them is as good as the only one.
        self.candidates = 1 if self.keep_candidate_mode == "random_any" else self.caption_num
        self.batch_size = images_per_call * (CALLS_PER_BATCH_ON_GPU if self.use_cuda() else 1)

    def process_batched(self, samples: dict[str, Any], rank: int | None = None) -> dict[str, Any]:
        """Caption the images of samples.

        Args:
            samples: Columns of samples.
            rank: Number of the worker process, which chooses its GPU.

        Returns:
            Columns of the captioned samples, with the originals where they are kept.

        Raises:
            ValueError: a sample names more images in its text than it has, the model is of no
                supported type, or LLaVA has no prompt that it can be asked.
        """
        keys = list(samples)
        rows = [
            dict(zip(keys, values, strict=True)) for values in zip(*samples.values(), strict=True)
        ]
        jobs = [job for number, row in enumerate(rows) for job in self._jobs(row, number)]
        captions = self._caption(jobs, rank) if jobs else []
        made = self._distribute_captions(captions, [job.place for job in jobs], rows)
        return {key: [sample[key] for sample in made] for key in keys}

    def _jobs(self, sample: Row, row: int) -> Iterator["_Job"]:
        """Yield the images of a sample that its text names."""
        pictures, offset = pictures_of(self, sample), 0
        prompt = sample.get(self.prompt_key) if self.prompt_key else None
        prompt = prompt if isinstance(prompt, str) else self.prompt or None
        text = sample[self.text_key]
        for chunk_number, chunk in enumerate(text.split(SpecialTokens.eoc) if pictures else ()):
            for number in range(chunk.count(SpecialTokens.image)):
                if offset == len(pictures):
                    raise too_few_pictures(self, sample)
                identity = f"{self.seed}\n{offset}\n{prompt}\n{text}".encode()
                yield _Job((row, chunk_number, number), pictures[offset], prompt, identity)
                offset += 1

    def _caption(self, jobs: Sequence["_Job"], rank: int | None) -> list[list[str]]:
        """Return the candidate captions of every job."""
        captioner = self._captioner(rank)
        prompts = {prompt: captioner.prompt_ids(prompt) for prompt in {job.prompt for job in jobs}}
        lengths = [len(prompts[job.prompt]) for job in jobs]
        groups = list(captioner.groups(lengths, self.images_per_call))
        captions: list[list[str]] = [[] for _ in jobs]

        def prepare(pictures: Sequence[Picture]) -> tuple[Any, list[bytes]]:
            pixels = pixels_of(captioner.processor, pictures)
            return pixels, [_content(picture) for picture in pixels]

        def group_pictures(group: list[int]) -> list[Picture]:
            return [jobs[index].picture for index in group]

        for group, parts in prepared(groups, group_pictures, prepare):
            pixels = joined([part for part, _ in parts], captioner.model)
            contents = [content for _, own in parts for content in own]
            own = [jobs[index] for index in group]
            ids = [prompts[job.prompt] for job in own]
            keys = [content + job.identity for content, job in zip(contents, own, strict=True)]
            texts = in_inference(self._generate, captioner, ids, pixels, keys)
            for index, candidates in zip(group, texts, strict=True):
                captions[index] = candidates
        return captions

    def _captioner(self, rank: int | None) -> "_Blip2 | _Llava":
        """Return the model in the form that its type asks for."""
        model, processor = load_model(self, rank)
        form = _FORMS.get(model.config.model_type)
        if form is None:
            raise ValueError(
                f"{self._name}: hf_img2seq is a {model.config.model_type} model; give the folder "
                f"of one that it supports, {' or '.join(_FORMS)}, or use image_captioning_mapper"
            )
        return form(self._name, model, processor)

    def _generate(
        self,
        captioner: "_Blip2 | _Llava",
        ids: Sequence[Sequence[int]],
        pixels: Any,
        keys: Sequence[bytes],
    ) -> list[list[str]]:
        """Return the candidates for pictures and their prompts; draws follow the keys."""
        repeats = self.candidates if self.do_sample else 1
        draw = []
        if self.do_sample:
            config = captioner.model.generation_config
            uniforms = _uniforms(keys, repeats, self.max_new_tokens)
            draw = [Draw(uniforms, config.temperature, config.top_k, config.top_p)]
        tokens, mask = captioner.batch(ids)
        made = captioner.model.generate(
            pixel_values=pixels.repeat_interleave(repeats, dim=0),
            input_ids=tokens.repeat_interleave(repeats, dim=0),
            attention_mask=mask.repeat_interleave(repeats, dim=0),
            max_new_tokens=self.max_new_tokens,
            # The draw leaves one token, which is then also the most probable.
            do_sample=False,
            logits_processor=draw,
        )
        texts = captioner.texts(made, tokens.shape[1])
        per_job = [texts[start : start + repeats] for start in range(0, len(texts), repeats)]
        return [own * (self.candidates // repeats) for own in per_job]


@dataclass(frozen=True)
class _Job:
    """An image to caption."""

    place: tuple[int, int, int]
    """Row, chunk of its text, and place in the chunk."""
    picture: Picture
    prompt: str | None
    identity: bytes
    """What the draws follow from, the image's content apart."""


class _Blip2:
    """BLIP-2, which goes on with the prompt's text, or begins a caption where there is none."""

    def __init__(self, operator: str, model: Any, processor: Any) -> None:
        self.model, self.processor = model, processor
        if model.config.image_token_index is None:
            name = str(processor.image_token)
            model.config.image_token_index = processor.tokenizer.convert_tokens_to_ids(name)

    def prompt_ids(self, prompt: str | None) -> list[int]:
        """Return the image's tokens and the prompt's: what the processor makes of both."""
        config = self.model.config
        image = [config.image_token_index] * config.num_query_tokens
        if prompt is None:
            return [*image, config.text_config.bos_token_id]
        return image + list(self.processor.tokenizer(prompt)["input_ids"])

    def groups(self, lengths: Sequence[int], limit: int) -> Iterator[list[int]]:
        """Yield places of prompts of equal lengths, at most `limit` together.

        Prompts of different lengths would need padding, which moves the positions of tokens.
        """
        for length in sorted(set(lengths)):
            places = [place for place, own in enumerate(lengths) if own == length]
            for start in range(0, len(places), limit):
                yield places[start : start + limit]

    def batch(self, ids: Sequence[Sequence[int]]) -> tuple[Any, Any]:
        """Return prompts of one length, (prompts, tokens), and their mask."""
        import torch

        tokens = torch.tensor(ids, device=self.model.device)  # (B, T)
        return tokens, torch.ones_like(tokens)

    def texts(self, made: Any, prompt_length: int) -> list[str]:
        """Return the texts of what was generated, the prompts in them."""
        return list(self.processor.batch_decode(made, skip_special_tokens=True))


class _Llava:
    """LLaVA-1.5, which answers a question about the image.

    Source: the conversation format of LLaVA-1.5 on Vicuna, as llava-hf's models document it.
    """

    def __init__(self, operator: str, model: Any, processor: Any) -> None:
        self._operator = operator
        self.model, self.processor = model, processor
        # How many places an image takes depends on the encoder, and so is asked of it.
        self._places = in_inference(self._image_length)

    def _image_length(self) -> int:
        import torch

        size = self.model.config.vision_config.image_size
        blank = torch.zeros(1, 3, size, size, device=self.model.device)  # (1, 3, H, W)
        features = self.model.get_image_features(blank.to(dtype_of(self.model))).pooler_output
        return int(features[0].shape[0])

    def prompt_ids(self, prompt: str | None) -> list[int]:
        """Return the tokens of the question about an image, the image's place filled in.

        Raises:
            ValueError: there is no prompt, it brings an image's marker of its own, or the folder's
                tokenizer does not know the marker.
        """
        marker = str(self.processor.image_token)
        if prompt is None or marker in prompt:
            raise ValueError(
                f"{self._operator}: a llava model is asked a question, and the prompt is "
                f"{prompt!r}; write the question alone under prompt, such as 'Describe the picture "
                f"in one sentence.'; {marker} and the speakers are put around it"
            )
        image = self.model.config.image_token_id
        ids = list(self.processor.tokenizer(f"USER: {marker}\n{prompt} ASSISTANT:")["input_ids"])
        if ids.count(image) != 1:
            raise ValueError(
                f"{self._operator}: the tokenizer of hf_img2seq does not turn {marker} into token "
                f"{image}, which config.json names as image_token_index; get the folder again"
            )
        place = ids.index(image)
        return [*ids[:place], *[image] * self._places, *ids[place + 1 :]]

    def groups(self, lengths: Sequence[int], limit: int) -> Iterator[list[int]]:
        """Yield the places of prompts, the shortest first, at most `limit` together."""
        places = sorted(range(len(lengths)), key=lengths.__getitem__)
        for start in range(0, len(places), limit):
            yield places[start : start + limit]

    def batch(self, ids: Sequence[Sequence[int]]) -> tuple[Any, Any]:
        """Return prompts, (prompts, tokens), with padding on their left, and their mask."""
        import torch

        tokenizer, longest = self.processor.tokenizer, max(map(len, ids))
        filler = tokenizer.pad_token_id
        filler = tokenizer.eos_token_id if filler is None else filler
        padded = [[filler] * (longest - len(own)) + list(own) for own in ids]
        seen = [[0] * (longest - len(own)) + [1] * len(own) for own in ids]
        device = self.model.device
        return torch.tensor(padded, device=device), torch.tensor(seen, device=device)  # (B, T)

    def texts(self, made: Any, prompt_length: int) -> list[str]:
        """Return the answers alone."""
        answers = made[:, prompt_length:]
        texts = self.processor.batch_decode(answers, skip_special_tokens=True)
        return [text.strip() for text in texts]


_FORMS: dict[str, type[_Blip2] | type[_Llava]] = {"blip-2": _Blip2, "llava": _Llava}
"""By the model_type of config.json."""


class Draw:
    """A logits processor that draws each row's next token and leaves no other.

    `torch.multinomial` draws a random number for every token of the vocabulary; here one number a
    row chooses among the tokens that top_k leaves.
    """

    def __init__(
        self,
        uniforms: Any,
        temperature: float | None,
        top_k: int | None,
        top_p: float | None,
    ) -> None:
        """Take numbers in [0, 1), (rows, steps), and the settings; None means transformers' own."""
        self._uniforms = uniforms
        self._step = 0
        self._temperature = 1.0 if temperature is None else temperature
        self._top_k = 50 if top_k is None else top_k
        self._top_p = 1.0 if top_p is None else top_p

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Return scores (rows, vocabulary) that are finite for the drawn tokens only."""
        import torch

        if self._step == 0:
            self._uniforms = self._uniforms.to(scores.device)
        size = scores.shape[-1]
        kept, tokens = scores.float().topk(min(self._top_k or size, size), dim=-1)
        share = (kept / self._temperature).softmax(dim=-1)
        below = share.cumsum(dim=-1) - share
        share = share.masked_fill(below >= self._top_p, 0.0) if self._top_p < 1.0 else share
        reached = share.cumsum(dim=-1)
        goal = self._uniforms[:, self._step, None] * reached[:, -1:]
        last = (share > 0).sum(dim=-1, keepdim=True) - 1
        choice = torch.minimum((reached <= goal).sum(dim=-1, keepdim=True), last)
        self._step += 1
        drawn = torch.full_like(scores, float("-inf"))
        return drawn.scatter_(1, tokens.gather(1, choice), 0.0)


def _content(picture: Any) -> bytes:
    """Return a digest of a picture's (3, height, width) input."""
    return hashlib.blake2b(picture.numpy().tobytes(), digest_size=16).digest()


def _uniforms(keys: Sequence[bytes], repeats: int, steps: int) -> Any:
    """Return the numbers that choose tokens, (keys * repeats, steps).

    Each key has a stream of its own, so that a caption's draws do not depend on its batch.
    """
    import torch

    streams = []
    for key in keys:
        number = int.from_bytes(hashlib.blake2b(key, digest_size=16).digest())
        streams.append(np.random.Generator(np.random.Philox(key=number)).random((repeats, steps)))
    return torch.from_numpy(np.concatenate(streams)).float()
