"""The fast engine: prompt → latent cache → tokens, with every weight read in the bits that it is kept in."""

import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from kimi_vl.engine.base import Engine, Generation, ModelInputs, Stopwatch, to_device
from kimi_vl.engine.fast.chunk_attention import CHUNK, OPENING, KeysAndValues, attend_by_rectangles, planned
from kimi_vl.engine.fast.decode import AHEAD, Decoder
from kimi_vl.engine.fast.kernels.gated_product import is_fused
from kimi_vl.engine.fast.kernels.operation import compile_ahead, is_hopper, without_launches
from kimi_vl.engine.fast.memory import context_that_fits
from kimi_vl.engine.fast.network import Network
from kimi_vl.engine.fast.pictures import Pictures
from kimi_vl.engine.fast.prefill import Piece, prefill, span_on
from kimi_vl.engine.fast.prompt import Prompt, Seen
from kimi_vl.engine.fast.prompt_graphs import PromptGraphs


class FastEngine(Engine):
    """One request at a time, at the speed of the memory.

    What a prompt shares with the one before it is not computed again. It is taken up only where a prompt is cut in any
    case, so that every token's row of the cache is computed in the same pieces, and comes out the same to the bit,
    whatever ran before. The price: a conversation that was not seen before goes through in one piece a turn, and of two
    prompts nothing is shared if only one of them begins with OPENING tokens at once.
    """

    @torch.inference_mode()
    def __init__(self, network: Network, answer_prefix: tuple[int, ...] = ()) -> None:
        """
        Args:
            network: on a CUDA GPU in bfloat16; on the CPU (for tests) the kernels' references run, in any type.
            answer_prefix: the token ids that open each of the model's turns in a conversation.
        """
        self.weights = network.weights
        super().__init__(context_that_fits(self.weights, network.config.text_config.max_position_embeddings))
        shape = len(self.weights.layers), self.context_length, self.weights.row
        self.cache = self.weights.embeddings.new_zeros(shape)
        self.rotary = self.weights.rotary(self.context_length)
        self.decoder = Decoder(self.weights, self.cache, self.rotary)
        self._graphs = PromptGraphs(self.weights, self.cache, self.rotary)
        self.pictures = Pictures(network)
        self._stopwatch = Stopwatch(self.cache.device)
        self.cached_tokens = 0  # of the last request: taken from the one before it
        self._media_id = network.config.media_placeholder_token_id
        self._answer_prefix = answer_prefix
        self._seen: Seen | None = None  # what the cache holds
        if self.cache.is_cuda:
            self._get_ready()

    def _get_ready(self) -> None:
        """Compiles all kernels and captures all graphs, so that the first request is as quick as any."""
        hopper = is_hopper(self.cache.device)
        planning = self._thread.submit(self._plan_attention) if hopper else None
        compile_ahead(self.decoder.example, self._graphs.example, self.pictures.blocks.example)
        if planning:
            planning.result()
        self.decoder.capture()
        self.pictures.blocks.capture()
        if hopper:  # elsewhere grouped products wait for the host
            self._graphs.capture()
        torch.cuda.empty_cache()

    @torch.inference_mode()
    def _plan_attention(self) -> None:
        """Asks cuDNN for everything that a prompt may ask of it; a plan belongs to the thread that made it."""
        attention = self.weights.layers[0][0]
        kept = KeysAndValues(self.cache[0], attention)
        for tokens, context in planned(self.context_length):
            projected = self.cache.new_zeros(tokens, attention.projections.shape[0])
            q = projected[:, : -attention.row]  # a plan is for such strides, too
            k, v = kept.until(context)
            # compile_ahead, which runs meanwhile, has the other kernels
            without_launches(partial(attend_by_rectangles, q, k, v, self.cache[0], attention, span_on(q.device, 0, 1)))

    @torch.inference_mode()
    def _decode(self, inputs: ModelInputs, generation: Generation) -> None:
        try:
            self._read(inputs, lambda: generation.stopped)
            generation.cached_tokens = self.cached_tokens
            if not generation.stopped:
                self._write(inputs.input_ids.shape[1], generation)
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)  # they hold the tensors of what failed
            if self.cache.is_cuda:
                torch.cuda.empty_cache()
            raise

    def _read(self, inputs: ModelInputs, stopped: Callable[[], bool] = lambda: False) -> None:
        """Fills the cache with the prompt, and `decoder.logits` with what follows it; or not, once it is stopped."""
        self._stopwatch.start()
        prompt = Prompt.of(inputs, self._media_id, self._answer_prefix)
        self.cached_tokens = self._reusable(prompt)
        stops = [stop for stop in _piece_ends(prompt) if stop > self.cached_tokens]
        for start, *ends in self._together(self.cached_tokens, stops):
            x = self._embed(prompt, start, ends[-1], stopped)
            if stopped():
                return
            self._stopwatch.ended("vision")
            self._seen = None  # until the cache holds all of it
            self._prefill(x, start, ends, stopped)
            if stopped():
                return
            del x  # its memory is for the next one
            self._stopwatch.ended("prefill")
        self.decoder.predict()
        self._stopwatch.ended("prefill")
        self._seen = prompt.seen()

    def _reusable(self, prompt: Prompt) -> int:
        """How many of the prompt's tokens the cache holds, from the same pieces; at least one is left to compute."""
        reusable = 0
        if self._seen is not None:
            shared = self._seen.shared_with(prompt)
            for stop, seen in zip(_piece_ends(prompt), _piece_ends(self._seen), strict=False):
                if stop != seen or stop > shared or stop == len(prompt.ids):
                    break
                reusable = stop
        return reusable

    def _together(self, first: int, stops: Sequence[int]) -> Iterator[list[int]]:
        """Groups of pieces that go through the layers together, each as its start and the end of every piece.

        A piece that has a graph goes alone. Of the others all that are neighbours go together, or no more than OPENING
        tokens where experts' products are not fused, and need more memory of what may be a small GPU.
        """
        longest = self.context_length if is_fused(self.weights.layers[-1][1].gate_up, self.cache.device) else OPENING
        group = [first]
        for start, end in pairwise([first, *stops]):
            alone = self._graphs.fits(end - start, end)
            if len(group) > 1 and (alone or end - group[0] > longest):
                yield group
                group = [start]
            group.append(end)
            if alone:
                yield group
                group = [end]
        if len(group) > 1:
            yield group

    def _prefill(self, x: Tensor, start: int, ends: Sequence[int], stopped: Callable[[], bool] = lambda: False) -> None:
        """Takes tokens x [tokens, width] from a position on through the model, in pieces that end at some others."""
        if (hidden := self._graphs.run(x, start)) is not None:
            found = [hidden]
        else:
            pieces = [
                Piece(slice(first - start, end - start), span_on(x.device, first, end - first), end)
                for first, end in pairwise([start, *ends])
            ]
            if len(x) * ends[-1] > CHUNK**2:  # else they are through in a quarter of a second
                stopped = _paced(x.device, stopped)
            found = prefill(self.weights, self.cache, self.rotary, x, pieces, stopped)
        for hidden, end in zip(found, ends, strict=False):  # nothing was found once it is stopped
            self.decoder.last_layer(hidden, end - 1)  # whether or not it is the last piece: the same cache either way

    def _embed(self, prompt: Prompt, start: int, end: int, stopped: Callable[[], bool]) -> Tensor:
        """[end - start, width]: embeddings of the tokens, and the pictures' features where the media ids stand.

        A picture is encoded while the next one's patches are made; none is once stopped says that nobody waits for it.
        """
        embeddings = self.weights.embeddings
        x = embeddings[to_device(prompt.ids[start:end], embeddings.device)]
        for place, picture in prompt.pictures:
            first, last = max(place, start), min(place + picture.tokens, end)
            if first < last and not stopped():
                x[first - start : last - start] = self.pictures.features(picture)[first - place : last - place]
        return x

    def _write(self, length: int, generation: Generation) -> None:
        """Makes tokens and hands them on; the GPU stays some steps ahead, or half a step under a constraint."""
        params, constraint, output = generation.params, generation.constraint, list[int]()
        self.decoder.begin(length, params, output, constraint.mask() if constraint else None)
        started = 1
        while True:
            while not constraint and started < min(len(output) + 1 + AHEAD, params.max_new_tokens):
                self.decoder.step()
                started += 1
            output.append(self.decoder.token(len(output)))
            if len(output) == 1:
                generation.timings |= self._stopwatch.seconds()
            if not generation.emit(output[-1]):
                return
            forced = generation.forced_after(output[-1])
            if not all(map(generation.emit, forced)):
                return
            if constraint:
                for token in (output[-1], *forced):
                    constraint.accept(token)
            if forced:
                self._append(forced, length + len(output))  # in place of what the steps ahead have made
                output += forced
                self.decoder.begin(length, params, output, constraint.mask() if constraint else None)
                started = len(output) + 1
            elif constraint:
                self.decoder.choose(constraint.mask())

    def _append(self, tokens: Sequence[int], start: int) -> None:
        """Reads tokens at a position as if the prompt went on with them."""
        x = self.weights.embeddings[to_device(torch.tensor(tokens), self.cache.device)]
        self._prefill(x, start, [start + len(tokens)])
        self.decoder.predict()


def _paced(device: torch.device, stopped: Callable[[], bool]) -> Callable[[], bool]:
    """`stopped`, which also waits for the GPU to reach where it was asked the last time but one.

    Else the host would launch all of a prompt before it asks whether anybody still waits for it.
    """
    begun = deque[torch.cuda.Event]()

    def is_stopped() -> bool:
        if device.type == "cuda":
            begun.append(torch.cuda.Event(blocking=True))
            begun[-1].record()
            if len(begun) > 2:
                begun.popleft().synchronize()
        return stopped()

    return is_stopped


def _piece_ends(prompt: Prompt | Seen) -> list[int]:
    """Where the pieces end in which a prompt is computed; only its opening reaches over a multiple of CHUNK."""
    length = len(prompt.ids)
    ends = {length, *prompt.ends}
    first = OPENING if min(ends) >= OPENING else CHUNK
    return sorted({*ends, *range(first, length, CHUNK)})
