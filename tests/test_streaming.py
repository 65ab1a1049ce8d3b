"""Streams: the masked whole at any cutting, states that are values, many streams side by side, memory, refusals, latency by counting."""
import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from speechlearn.zipformer.convolution import Conv2dSubsampling
from speechlearn.zipformer.encoder import Zipformer2
from speechlearn.zipformer.streaming import QUIET, StreamingEncoder, StreamState, chunk_frames, join_states, latency_ms, split_states

CHUNK, LEFT, BINS, WIDTH = 8, 16, 12, 16
TINY = dict(
    downsampling_factor=(1, 2, 4), encoder_dim=(12, 16, 12), num_encoder_layers=(1, 2, 1), encoder_unmasked_dim=12, query_head_dim=5, pos_head_dim=3, value_head_dim=4, num_heads=2, feedforward_dim=16,
    cnn_module_kernel=(7, 5, 5), pos_dim=8,
)


def made(bins=BINS, causal=True, chunk_size=(CHUNK,), left_context_frames=(LEFT,)):
    """Front end and encoder whose projections are not small, in 64 bits."""
    torch.manual_seed(0)
    chunks = dict(chunk_size=chunk_size, left_context_frames=left_context_frames) if causal else {}
    parts = Conv2dSubsampling(bins, 12, 2, 3, 4).double(), Zipformer2(**TINY, causal=causal, **chunks).double()
    with torch.no_grad():
        for part in parts:
            for parameter in part.parameters():
                parameter.add_(0.15 * torch.randn_like(parameter))
    return parts


STREAM = StreamingEncoder(*made())


def noise(n_frames, batch=1, bins=BINS, seed=1):
    return torch.randn(batch, n_frames, bins, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@torch.no_grad()
def masked_whole(stream, features):
    """All at once, with the encoder's own chunk mask; quiet frames behind the end, so that the last chunk is whole."""
    steps = max(0, (features.shape[1] - 7) // 2)
    whole_steps = math.ceil(steps / stream.chunk_size) * stream.chunk_size
    if not whole_steps:
        return features.new_zeros(len(features), 0, WIDTH)
    quiet = features.new_full((len(features), max(0, 2 * whole_steps + 13 - features.shape[1]), features.shape[2]), QUIET)
    padded = torch.cat([features, quiet], dim=1)
    x, _ = stream.front_end(padded, torch.full((len(features),), padded.shape[1]))
    out, _ = stream.encoder(x[:, :whole_steps].transpose(0, 1), torch.full((len(features),), whole_steps))
    return out.transpose(0, 1)[:, : (steps + 1) // 2]


def send(stream, features, sizes=(), state=None):
    """Features in pieces of these sizes, the rest at once: what came out, and the state."""
    state, said, first = state or stream.start(len(features), bins=features.shape[2]), [], 0
    for size in [*sizes, features.shape[1]]:
        out, state = stream.accept(state, features[:, first : first + size])
        said.append(out)
        first += size
    return torch.cat(said, dim=1), state


def to_the_end(stream, features, sizes=()):
    out, state = send(stream, features, sizes)
    return torch.cat([out, stream.finish(state)], dim=1)


def tensors(state):
    return [state.waiting, state.front_end, *state.encoder, state.processed, state.received]


def same(one, two):
    return all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(tensors(one), tensors(two), strict=True))


def close(ours, expected):
    torch.testing.assert_close(ours, expected, atol=1e-9, rtol=0)


class TestTheMaskedWhole:
    @settings(max_examples=25, deadline=None)
    @given(st.integers(0, 150), st.lists(st.integers(0, 70), max_size=8), st.integers(1, 2))
    @example(9, [], 1)
    @example(2 * 24 + 13, [1] * 61, 1)
    def test_any_cutting_of_any_length(self, n_frames, sizes, batch):
        features = noise(n_frames, batch, seed=n_frames)
        whole, pieced = masked_whole(STREAM, features), to_the_end(STREAM, features, sizes)
        assert whole.shape == pieced.shape == (batch, (max(0, (n_frames - 7) // 2) + 1) // 2, WIDTH)
        close(pieced.double(), whole)

    @pytest.mark.parametrize("chunk, left", [(4, 8), (8, 8), (8, 32), (16, 16), (16, 64)])
    def test_chunks_and_contexts(self, chunk, left):
        stream, features = StreamingEncoder(*made(chunk_size=(chunk,), left_context_frames=(left,))), noise(143)
        close(to_the_end(stream, features, [50, 3]), masked_whole(stream, features))

    def test_32_bits(self):
        front_end, encoder = made()
        stream, features = StreamingEncoder(front_end.float(), encoder.float()), noise(143).float()
        ours, whole = to_the_end(stream, features, [31] * 4), masked_whole(stream, features)
        assert ours.dtype == torch.float32
        assert (ours - whole).abs().max() < 1e-5 * whole.abs().max()

    def test_the_mask_matters(self):
        """The comparison above would notice a stream with less of a past."""
        shorter, features = StreamingEncoder(*made(left_context_frames=(LEFT // 2,))), noise(143)
        assert (masked_whole(shorter, features) - masked_whole(STREAM, features)).abs().max() > 1e-3

    def test_what_was_said_stays_true(self):
        """Output that has come out does not depend on what comes later."""
        features = noise(120)
        early, state = send(STREAM, features[:, :77])
        for seed in (5, 6):
            later = torch.cat([features[:, :77], noise(60, seed=seed)], dim=1)
            close(masked_whole(STREAM, later)[:, : early.shape[1]], early)
        assert early.shape[1] == 16 and state.processed.tolist() == [32]

    def test_what_comes_out_when(self):
        """A chunk comes out with frame 2c + 13, and then with every 2c more."""
        state, after = STREAM.start(bins=BINS), []
        for n in range(1, 65):
            out, state = STREAM.accept(state, noise(1, seed=n))
            after += [n] * bool(out.shape[1])
            assert out.shape[1] in (0, CHUNK // 2)
        assert after == [29, 45, 61]


class TestStates:
    def test_the_old_state_stays_valid(self):
        _, state = send(STREAM, noise(77))
        before = [tensor.clone() for tensor in tensors(state)]
        first, after = STREAM.accept(state, noise(50, seed=2))
        STREAM.accept(state, noise(50, seed=3))
        STREAM.finish(state)
        assert all(torch.equal(old, new) for old, new in zip(before, tensors(state)))
        again, after_again = STREAM.accept(state, noise(50, seed=2))
        assert torch.equal(first, again) and same(after, after_again) and not same(state, after)

    def test_the_state_does_not_share_the_callers_features(self):
        features = noise(20)
        _, state = STREAM.accept(STREAM.start(bins=BINS), features)
        features.fill_(9.0)
        assert torch.equal(state.waiting, noise(20))

    def test_finish_twice(self):
        _, state = send(STREAM, noise(90))
        one, two = STREAM.finish(state), STREAM.finish(state)
        assert one.shape[1] > 0 and torch.equal(one, two)

    def test_fields_cannot_be_set(self):
        state = STREAM.start(3, bins=BINS)
        assert isinstance(state, StreamState) and len(state) == 3
        with pytest.raises(AttributeError):
            state.processed = torch.zeros(1)

    def test_no_gradient_is_kept(self):
        out, state = STREAM.accept(STREAM.start(bins=BINS), noise(60))
        assert out.shape[1] and not out.requires_grad and not any(tensor.requires_grad for tensor in tensors(state))

    def test_evaluation_mode(self):
        front_end, encoder = made()
        StreamingEncoder(front_end.train(), encoder.train())
        assert not front_end.training and not encoder.training

    def test_counts(self):
        _, state = send(STREAM, noise(100, batch=2), [40, 0, 13])
        assert state.received.tolist() == [100, 100] and state.processed.tolist() == [40, 40]
        assert torch.equal(state.waiting, noise(100, batch=2)[:, 80:])


class TestShortStreams:
    def test_nothing(self):
        state = STREAM.start(2, bins=BINS)
        assert STREAM.finish(state).shape == (2, 0, WIDTH)
        for _ in range(3):
            out, state = STREAM.accept(state, noise(0, batch=2))
            assert out.shape == (2, 0, WIDTH)
        assert state.received.tolist() == [0, 0] and STREAM.finish(state).shape == (2, 0, WIDTH)

    def test_empty_pieces_change_nothing(self):
        _, state = send(STREAM, noise(50))
        out, after = STREAM.accept(state, noise(0))
        assert out.shape[1] == 0 and same(state, after)

    @pytest.mark.parametrize("n_frames, n_out", [(1, 0), (8, 0), (9, 1), (10, 1), (11, 1), (12, 1), (13, 2), (28, 5), (29, 6)])
    def test_lengths(self, n_frames, n_out):
        """Nine frames make a step, two more the next one, and two steps an output."""
        assert to_the_end(STREAM, noise(n_frames)).shape == (1, n_out, WIDTH)

    def test_what_is_left_at_the_end(self):
        """61 frames have 27 steps, of which 24 could be computed: 3 are left. 55 frames have 24 steps, and were 6 short of the third chunk: 8 are left."""
        for n_frames, n_rest in ((61, 2), (55, 4)):
            _, state = send(STREAM, noise(n_frames))
            assert STREAM.finish(state).shape[1] == n_rest


class TestManyStreams:
    @settings(max_examples=8, deadline=None)
    @given(st.lists(st.integers(0, 4), min_size=1, max_size=4), st.integers(0, CHUNK * 2 - 1))
    def test_round_trip_and_together_as_alone(self, chunks, waiting):
        """Streams that have heard more or less, and wait for equally much."""
        states = [send(STREAM, noise((16 * n + 13 if n else 0) + (waiting if n else waiting + 13), seed=10 + n))[1] for n in chunks]
        joined = join_states(states)
        assert len(joined) == len(chunks) and joined.processed.tolist() == [8 * n for n in chunks]
        assert all(same(one, state) for one, state in zip(split_states(joined), states, strict=True))
        arriving = noise(40, batch=len(chunks), seed=99)
        out, after = STREAM.accept(joined, arriving)
        for i, (state, one) in enumerate(zip(states, split_states(after), strict=True)):
            alone, expected = STREAM.accept(state, arriving[i : i + 1])
            close(out[i : i + 1], alone)
            for a, b in zip(tensors(one), tensors(expected), strict=True):
                close(a, b)

    def test_order(self):
        a, b = (send(STREAM, noise(60, seed=seed))[1] for seed in (1, 2))
        one, two = split_states(join_states([b, a]))
        assert same(one, b) and same(two, a) and not same(a, b)

    def test_joined_states_of_several(self):
        pair, single = send(STREAM, noise(60, batch=2))[1], send(STREAM, noise(60, seed=3))[1]
        joined = join_states([pair, single])
        assert len(joined) == 3 and same(join_states(split_states(joined)), joined)

    def test_unequal_waiting(self):
        states = [send(STREAM, noise(n))[1] for n in (10, 11)]
        with pytest.raises(ValueError, match=r"\[10, 11\] wait"):
            join_states(states)
        with pytest.raises(ValueError, match="streams can be joined"):
            join_states([])

    def test_ends_of_unequal_streams(self):
        """Equally much is waiting, but not equally much was received: each is finished alone, and then right."""
        long, short = noise(16 * 3 + 20), noise(16 + 20, seed=2)
        joined = join_states([send(STREAM, long)[1], send(STREAM, short)[1]])
        with pytest.raises(ValueError, match=r"received \[68, 36\] frames; split the state"):
            STREAM.finish(joined)
        for state, features in zip(split_states(joined), (long, short)):
            whole, rest = masked_whole(STREAM, features), STREAM.finish(state)
            close(rest, whole[:, whole.shape[1] - rest.shape[1] :])


class TestMemory:
    def test_a_long_stream_keeps_no_more_than_a_short_one(self):
        """Bytes of the storages, so that a view of something large counts as large."""
        held = lambda state: {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors(state)}
        _, state = send(STREAM, noise(200))
        short = sum(held(state).values())
        for seed in range(8):
            _, state = STREAM.accept(state, noise(200, seed=seed))
            assert state.waiting.shape[1] < STREAM.window
            assert sum(held(state).values()) <= short + 8 * BINS * STREAM.window
        assert state.received.tolist() == [1800]

    @pytest.mark.parametrize("n_frames", [300, 1205])
    def test_one_long_piece_is_not_kept(self, n_frames):
        """What waits are a few frames, and not a view of all that came; the caches are as small as after a short piece."""
        _, state = send(STREAM, noise(n_frames))
        assert state.waiting.untyped_storage().nbytes() == 8 * BINS * state.waiting.shape[1] <= 8 * BINS * STREAM.window
        held = sum(tensor.untyped_storage().nbytes() for tensor in tensors(state)[1:])
        assert held == sum(tensor.untyped_storage().nbytes() for tensor in tensors(send(STREAM, noise(60))[1])[1:])

    def test_sizes_of_the_caches(self):
        state = STREAM.start(3, bins=BINS)
        shapes = [tuple(tensor.shape) for tensor in state.encoder[:6]]
        assert len(state.encoder) == 6 * 4 and shapes == [(16, 3, 10), (1, 3, 16, 9), (16, 3, 8), (16, 3, 8), (3, 12, 3), (3, 12, 3)]
        assert [tuple(tensor.shape) for tensor in send(STREAM, noise(100, batch=3))[1].encoder[:6]] == shapes


class TestRefusals:
    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_numbers_that_are_none(self, bad):
        features = noise(30)
        features[0, 29, 3] = bad
        state = STREAM.start(bins=BINS)
        with pytest.raises(ValueError, match="NaN or infinite"):
            STREAM.accept(state, features)
        close(STREAM.accept(state, noise(30))[0], masked_whole(STREAM, noise(30))[:, :4])

    def test_another_number_of_streams(self):
        with pytest.raises(ValueError, match=r"the state is of 2 stream\(s\), the features are of 3"):
            STREAM.accept(STREAM.start(2, bins=BINS), noise(5, batch=3))

    @pytest.mark.parametrize(
        "changes", [dict(causal=False), dict(chunk_size=(8, 16)), dict(chunk_size=(-1,)), dict(left_context_frames=(16, 32)), dict(left_context_frames=(-1,))]
    )
    def test_encoders_that_cannot_stream(self, changes):
        with pytest.raises(ValueError, match="stream"):
            StreamingEncoder(*made(**changes))

    @pytest.mark.parametrize("chunk, left, message", [(6, 24, "multiple of the downsampling factor"), (8, 20, "20.*multiple.*8"), (8, 4, "4.*multiple.*8")])
    def test_sizes_that_do_not_fit(self, chunk, left, message):
        with pytest.raises(ValueError, match=message):
            StreamingEncoder(*made(chunk_size=(chunk,), left_context_frames=(left,)))

    def test_bins(self):
        """80 are the default; a front end of another width needs its own, and says so."""
        stream = StreamingEncoder(*made(bins=80))
        close(to_the_end(stream, noise(60, bins=80), [44]), masked_whole(stream, noise(60, bins=80)))
        assert stream.start().waiting.shape == (1, 0, 80)
        with pytest.raises(ValueError, match="80 bins do not fit.*which leaves 2 bands"):
            STREAM.start()
        with pytest.raises(ValueError, match="for 12 bins, the features have 13"):
            STREAM.accept(STREAM.start(bins=BINS), noise(20, bins=13))


class TestFrames:
    def test_quiet_frames_are_those_of_silence(self):
        """The end sounds as if features of log energy 1e-10 had been sent."""
        features = noise(40)
        sent = torch.cat([features, torch.full((1, 40, BINS), math.log(1e-10), dtype=torch.float64)], dim=1)
        close(to_the_end(STREAM, features), send(STREAM, sent)[0][:, :8])
        assert send(STREAM, features)[0].shape[1] == 4

    def test_the_reach_of_a_chunk(self):
        """The last feature frame that a chunk's steps depend on, found with gradients, is number 2c + 12."""
        front_end, _ = made()
        front_end.eval()
        features = noise(80).requires_grad_()
        steps, _ = front_end(features, torch.tensor([80]))
        (gradient,) = torch.autograd.grad(steps[0, CHUNK - 1].square().sum(), features)
        used = gradient[0].abs().sum(dim=1).nonzero().flatten()
        assert int(used[-1]) == 2 * CHUNK + 12 == chunk_frames(CHUNK)[0] - 1

    @given(st.integers(1, 200))
    def test_latency_by_counting(self, chunk):
        window, hop = chunk_frames(chunk)
        ready = (window - 1) * 10 + 25
        waits = [ready - 20 * t for t in range(chunk + 1)]
        assert latency_ms(chunk) == (min(waits), sum(waits) / len(waits), max(waits)) and hop * 10 == 20 * chunk
