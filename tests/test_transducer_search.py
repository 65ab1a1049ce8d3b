"""Transducer searches: tables by hand, exact sums with a limit per step, merging, language models, streams."""
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speechlearn.alignment.language_model import train_ngram
from speechlearn.alignment.search import WordFusion
from speechlearn.alignment.transducer import Decoder, Joiner
from speechlearn.alignment.transducer_search import SearchState, TransducerHypothesis, TransducerSearch, agreed, transducer_greedy
from speechlearn.text import CharacterVocabulary


def tensor(values):
    return torch.tensor(values, dtype=torch.long)


class LastSymbol(Decoder):
    """Its vector is the last symbol, one hot."""

    def __init__(self, vocab):
        super().__init__(vocab, vocab, 0, 1)
        self.embedding.weight.data.copy_(torch.eye(vocab))


class Table(Joiner):
    """Probabilities from a table: (last symbol, step, next symbol). The sound is the number of the step."""

    def __init__(self, table):
        super().__init__(1, len(table), len(table), len(table))
        self.table = torch.tensor(table, dtype=torch.float64).log()
        self.encoder_proj = torch.nn.Identity()
        self.decoder_proj.weight.data.copy_(torch.eye(len(table)))
        self.decoder_proj.bias.data.zero_()

    def forward(self, encoder_out, decoder_out, project_input=True):
        return self.table[decoder_out.argmax(dim=-1), encoder_out[..., 0].long()].float()


def by_table(table, **options):
    """(search, sound, greedy search) of a table."""
    joiner, decoder = Table(table), LastSymbol(len(table))
    sound = torch.arange(len(table[0]))[:, None].float()
    return TransducerSearch(decoder, joiner, **options), sound, lambda **o: transducer_greedy(sound[None], tensor([len(sound)]), decoder=decoder, joiner=joiner, **o)[0]


def run(search, sound):
    return search.results(search.feed(sound, search.start()))


def network(seed=0, vocab=4, context_size=2, dim=8, sharpness=3.0, n=3, n_steps=6):
    torch.manual_seed(seed)
    decoder, joiner = Decoder(vocab, dim, 0, context_size).eval(), Joiner(dim, dim, dim, vocab).eval()
    for part in (joiner.encoder_proj, joiner.decoder_proj):
        part.weight.data.mul_(4)
    return decoder, joiner, sharpness * torch.randn(n, n_steps, dim)


class Arcs:
    """Log-probabilities for one utterance, asked for one by one, without caches and batches."""

    def __init__(self, decoder, joiner, sound):
        self.decoder, self.joiner, self.sound, self.known = decoder, joiner, sound, {}

    def __call__(self, tokens, t):
        if (tokens, t) not in self.known:
            with torch.no_grad():
                context = [-1] * self.decoder.context_size + [self.decoder.blank_id, *tokens]
                vector = self.decoder(tensor([context[-self.decoder.context_size :]]), need_pad=False)[:, 0]
                self.known[tokens, t] = self.joiner(self.sound[t : t + 1], vector)[0].log_softmax(dim=-1).double().tolist()
        return self.known[tokens, t]


def all_texts(arcs, n_steps, vocab, max_symbols, never=()):
    """Text → (probability of all its paths, log-probability of the best one, steps of the best one), nothing left out."""
    texts = {(): (1.0, 0.0, ())}
    for t in range(n_steps):
        following = {}
        for text, (p, best, steps) in texts.items():
            for k in range(max_symbols + 1):
                for more in itertools.product([s for s in range(1, vocab) if s not in never], repeat=k):
                    lp = sum(arcs((*text, *more[:j]), t)[s] for j, s in enumerate((*more, 0)))
                    longer = (*text, *more)
                    old = following.get(longer, (0.0, -math.inf, ()))
                    path = (best + lp, (*steps, *[t] * k))
                    following[longer] = (old[0] + p * math.exp(lp), *max(path, old[1:]))
        texts = following
    return texts


# ---- greedy ---------------------------------------------------------------------------------------------------------

ANNA = [[[0.6, 0.4], [0.3, 0.7]], [[0.9, 0.1], [0.8, 0.2]]]  # after nothing, after "a": the chapter's distributions


def test_greedy_by_hand():
    found = by_table(ANNA)[2]()
    assert (found.tokens, found.steps) == ((1,), (1,)) and found.log_prob == found.score == pytest.approx(math.log(0.6 * 0.7 * 0.8))


@pytest.mark.parametrize("limit", [1, 2, 4])
def test_greedy_goes_round_until_its_limit(limit):
    """The chapter's exercise: at step 1 “a” and “b” follow each other; the blank that was not said counts."""
    rows = [[[0.2, 0.5, 0.3], [0.4, 0.3, 0.3], [0.8, 0.1, 0.1]], [[0.6, 0.2, 0.2], [0.3, 0.3, 0.4], [0.5, 0.3, 0.2]], [[0.7, 0.2, 0.1], [0.3, 0.6, 0.1], [0.6, 0.3, 0.1]]]
    found = by_table(rows)[2](max_symbols=limit)
    round_trip = [2, 1, 2, 1][:limit]
    assert found.tokens == (1, *round_trip) and found.steps == (0, *[1] * limit)
    end = 0.5 if round_trip[-1] == 1 else 0.6
    assert found.log_prob == pytest.approx(math.log(0.5 * 0.6 * math.prod([0.4, 0.6, 0.4, 0.6][:limit]) * 0.3 * end))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 3), st.lists(st.integers(0, 6), min_size=3, max_size=3).filter(any))
def test_greedy_in_a_batch_equals_one_loop_for_each(seed, context_size, limit, lengths):
    decoder, joiner, sound = network(seed, context_size=context_size)
    for i, n in enumerate(lengths):
        sound[i, n:] = math.nan  # nothing may look there
    found = transducer_greedy(sound, tensor(lengths), decoder=decoder, joiner=joiner, max_symbols=limit)
    for i, n in enumerate(lengths):
        arcs, tokens, steps, total = Arcs(decoder, joiner, sound[i]), (), (), 0.0
        for t in range(n):
            while steps.count(t) < limit and max(arcs(tokens, t)) > arcs(tokens, t)[0]:
                total += max(arcs(tokens, t))
                tokens, steps = (*tokens, arcs(tokens, t).index(max(arcs(tokens, t)))), (*steps, t)
            total += arcs(tokens, t)[0]
        assert (found[i].tokens, found[i].steps) == (tokens, steps) and found[i].log_prob == pytest.approx(total, abs=1e-4)


@pytest.mark.parametrize("never", [(1,), (1, 3), (0, 2)])  # the blank stays allowed
def test_greedy_never_writes_what_must_not_be_written(never):
    """As a joiner for which these symbols are as good as impossible; only the probabilities of the others differ then."""
    written = set()
    for seed in range(5):
        decoder, joiner, sound = network(seed)
        lengths = tensor([len(row) for row in sound])
        written |= {token for h in transducer_greedy(sound, lengths, decoder=decoder, joiner=joiner) for token in h.tokens}
        found = transducer_greedy(sound, lengths, decoder=decoder, joiner=joiner, never=never)
        for h, x in zip(found, sound):
            arcs, total = Arcs(decoder, joiner, x), 0.0
            for t in range(len(x)):
                total += sum(arcs(h.tokens[:place], t)[h.tokens[place]] for place, step in enumerate(h.steps) if step == t)
                total += arcs(h.tokens[: sum(step <= t for step in h.steps)], t)[0]
            assert h.log_prob == pytest.approx(total, abs=1e-4)
        with torch.no_grad():
            joiner.output_linear.bias[[symbol for symbol in never if symbol]] = -1e4
        impossible = transducer_greedy(sound, lengths, decoder=decoder, joiner=joiner)
        assert [(h.tokens, h.steps) for h in found] == [(h.tokens, h.steps) for h in impossible]
    assert written & set(never)  # without `never` they are written


# ---- beam -----------------------------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 3), st.sampled_from([(3, 2, 3), (3, 3, 2), (4, 3, 1), (3, 5, 1)]), st.booleans())
def test_a_beam_that_holds_everything_is_exact(seed, context_size, shape, forbid):
    vocab, n_steps, max_symbols = shape
    decoder, joiner, sound = network(seed, vocab, context_size)
    never = (2,) if forbid else ()
    truth = all_texts(Arcs(decoder, joiner, sound[0]), n_steps, vocab, max_symbols, never)
    found = run(TransducerSearch(decoder, joiner, beam=10**6, max_symbols=max_symbols, never=never), sound[0, :n_steps])
    assert {h.tokens for h in found} == set(truth) and [h.score for h in found] == sorted((h.score for h in found), reverse=True)
    for h in found:
        p, best, steps = truth[h.tokens]
        assert math.exp(h.log_prob) == pytest.approx(p, rel=1e-4) and h.score == h.log_prob
        arcs = Arcs(decoder, joiner, sound[0])
        own = sum(arcs(h.tokens[:u], t)[k] for u, (k, t) in enumerate(zip(h.tokens, h.steps))) + sum(arcs(h.tokens[: sum(s <= t for s in h.steps)], t)[0] for t in range(n_steps))
        assert own == pytest.approx(best, abs=1e-4)  # the steps are those of the best path (equal ones may stand for each other)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 2))
def test_a_narrow_beam_gives_lower_bounds_within_its_limits(seed, beam, max_symbols):
    decoder, joiner, sound = network(seed, 3, n_steps=4)
    truth = all_texts(Arcs(decoder, joiner, sound[0]), 4, 3, max_symbols)
    found = run(TransducerSearch(decoder, joiner, beam=beam, max_symbols=max_symbols), sound[0])
    assert 1 <= len(found) <= beam and len({h.tokens for h in found}) == len(found)
    for h in found:
        assert math.exp(h.log_prob) <= truth[h.tokens][0] * (1 + 1e-4)
        assert list(h.steps) == sorted(h.steps) and len(h.steps) == len(h.tokens) and all(0 <= t < 4 for t in h.steps)
        assert max((h.steps.count(t) for t in range(4)), default=0) <= max_symbols


def test_merging_decides_who_wins():
    """Alone, the empty text has the best path (0.385); both paths of "a" together have 0.57."""
    table = [[[0.7, 0.3], [0.55, 0.45]], [[0.95, 0.05], [0.95, 0.05]]]
    paths = {((), ()): 0.7 * 0.55, ((1,), (0,)): 0.3 * 0.95 * 0.95, ((1,), (1,)): 0.7 * 0.45 * 0.95}
    assert max(paths, key=paths.get) == ((), ())
    search, sound, greedy = by_table(table, beam=2, max_symbols=1)
    found = run(search, sound)
    assert [h.tokens for h in found] == [(1,), ()] and greedy().tokens == ()
    assert math.exp(found[0].log_prob) == pytest.approx(paths[(1,), (0,)] + paths[(1,), (1,)])
    assert found[0].steps == (1,)  # of the likelier of the two
    assert math.exp(found[1].log_prob) == pytest.approx(0.385)


def test_a_beam_repairs_what_greed_has_spoiled():
    """"a" is likelier at first, but after it nothing fits; "b" would have been right. Only a beam gets there."""
    table = [[[0.1, 0.5, 0.4]], [[0.3, 0.35, 0.35]], [[1.0, 1e-9, 1e-9]]]
    search, sound, greedy = by_table(table, beam=3)
    assert greedy(max_symbols=1).tokens == (1,) and run(search, sound)[0].tokens == (2,)
    assert run(by_table(table, beam=3, never=(2,))[0], sound)[0].tokens == (1,)


def test_limits_errors_and_nan():
    decoder, joiner, sound = network()
    for beam, max_symbols in ((0, 3), (4, 0), (-1, 1)):
        with pytest.raises(ValueError, match=f"beam is {beam} and max_symbols {max_symbols}; both must be at least 1"):
            TransducerSearch(decoder, joiner, beam=beam, max_symbols=max_symbols)
    search = TransducerSearch(decoder, joiner)
    damaged = sound[0].clone()
    damaged[4] = math.nan
    state = search.feed(damaged[:3], search.start())
    with pytest.raises(ArithmeticError, match="the joiner gives NaN at step 4; the model's weights or its input are damaged"):
        search.feed(damaged[3:], state)  # the step counts from the beginning of the stream
    with pytest.raises(ArithmeticError, match="the joiner gives NaN at step 4"):
        transducer_greedy(damaged[None], tensor([6]), decoder=decoder, joiner=joiner)
    assert run(search, sound[0, :0]) == [TransducerHypothesis((), (), 0.0, 0.0)]


# ---- language models ------------------------------------------------------------------------------------------------


class Watching:
    """A language model whose state is the text: it notices when a state and its text part."""

    def __init__(self, score=lambda text: 0.0, end=lambda text: 0.0):
        self.score, self.end, self.asked = score, end, 0

    def start(self):
        return ()

    def step(self, state, symbol):
        self.asked += 1
        return self.score((*state, symbol)), (*state, symbol)

    def finish(self, state):
        return self.end(state)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 2))
def test_scores_of_a_language_model_are_added_and_rank(seed, max_symbols):
    decoder, joiner, sound = network(seed, 3)
    model = Watching(lambda text: -0.3 * text[-1] - 0.1 * len(text), lambda text: 0.5 * len(text))
    found = run(TransducerSearch(decoder, joiner, beam=10**5, max_symbols=max_symbols, model=model), sound[0, :3])
    truth = all_texts(Arcs(decoder, joiner, sound[0]), 3, 3, max_symbols)
    assert {h.tokens for h in found} == set(truth) and model.asked > 0
    for h in found:
        expected = sum(-0.3 * k - 0.1 * (i + 1) for i, k in enumerate(h.tokens)) + 0.5 * len(h.tokens)
        assert math.exp(h.log_prob) == pytest.approx(truth[h.tokens][0], rel=1e-4) and h.score == pytest.approx(h.log_prob + expected)
    assert [h.score for h in found] == sorted((h.score for h in found), reverse=True)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5))
def test_states_of_the_language_model_belong_to_their_texts(seed, beam):
    decoder, joiner, sound = network(seed)
    search = TransducerSearch(decoder, joiner, beam=beam, model=Watching(lambda text: -0.2))
    state = search.feed(sound[0], search.start())
    assert state.n_steps == 6 and all(text.model_state == tokens and text.model_score == pytest.approx(-0.2 * len(tokens)) for tokens, text in state.texts.items())


def test_a_language_model_changes_the_winner_and_may_forbid_everything():
    search, sound, _ = by_table(ANNA)
    assert run(search, sound)[0].tokens == (1,)
    against = by_table(ANNA, model=Watching(lambda text: -3.0))[0]
    assert run(against, sound)[0].tokens == ()
    assert all(h.tokens == () for h in run(by_table(ANNA, model=Watching(lambda text: -math.inf))[0], sound))
    assert run(by_table(ANNA, model=Watching(end=lambda text: -math.inf))[0], sound) == []


def test_words_of_a_closed_vocabulary():
    vocabulary = CharacterVocabulary(" ab")
    ngram = train_ngram(["ab", "b ab"], order=2)
    special = tuple(range(1, len(vocabulary) - 3))
    decoder, joiner, sound = network(1, len(vocabulary))
    fusion = WordFusion(ngram, vocabulary, weight=0.5, word_bonus=0.2, closed=True)
    found = run(TransducerSearch(decoder, joiner, beam=3000, max_symbols=1, model=fusion, never=special), sound[0, :5])
    assert found and all(set(vocabulary.decode(h.tokens).split()) <= {"ab", "b"} for h in found) and len(found) > 3
    for h in found:
        text = vocabulary.decode(h.tokens)
        assert h.score == pytest.approx(h.log_prob + 0.5 * ngram.score(text) + 0.2 * len(text.split()))


# ---- streams --------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4), st.lists(st.integers(0, 6), max_size=5), st.booleans())
def test_pieces_of_any_size_give_what_all_at_once_gives(seed, beam, cuts, with_model):
    decoder, joiner, sound = network(seed)
    options = {"beam": beam, "model": Watching(lambda text: -0.1 * text[-1]) if with_model else None}
    at_once = run(TransducerSearch(decoder, joiner, **options), sound[0])
    search = TransducerSearch(decoder, joiner, **options)
    state, edges = search.start(), [0, *sorted(cuts), 6]  # some pieces are empty
    for first, last in zip(edges, edges[1:]):
        state = search.feed(sound[0, first:last], state)
    pieces = search.results(state)
    assert [(h.tokens, h.steps) for h in pieces] == [(h.tokens, h.steps) for h in at_once]
    for a, b in zip(pieces, at_once):
        assert (a.log_prob, a.score) == (pytest.approx(b.log_prob, abs=1e-4), pytest.approx(b.score, abs=1e-4))


def test_one_search_serves_many_streams_and_an_old_state_goes_on_in_two_ways():
    decoder, joiner, sound = network(2)
    fresh = [run(TransducerSearch(decoder, joiner), x) for x in sound]
    search = TransducerSearch(decoder, joiner)
    states = [search.start() for _ in sound]
    for t in range(6):  # in turns
        states = [search.feed(x[t : t + 1], state) for x, state in zip(sound, states)]
    assert [[(h.tokens, h.steps) for h in search.results(state)] for state in states] == [[(h.tokens, h.steps) for h in row] for row in fresh]
    half = search.feed(sound[0, :3], search.start())
    kept = dict(half.texts)
    ends = [search.results(search.feed(x[3:], half)) for x in sound]
    assert half.texts == kept and half.n_steps == 3
    for x, end in zip(sound, ends):
        whole = run(TransducerSearch(decoder, joiner), torch.cat([sound[0, :3], x[3:]]))
        assert [h.tokens for h in end] == [h.tokens for h in whole]


def test_agreed_by_hand():
    start = by_table(ANNA)[0].start()
    state = lambda *texts: SearchState(dict.fromkeys(texts, start.texts[()]))  # noqa: E731
    assert agreed(state((1, 2, 3), (1, 2), (1, 2, 4))) == (1, 2) and agreed(state((1, 2, 3), (1, 3))) == (1,)
    assert agreed(state((1, 2), ())) == () and agreed(state((1, 2))) == (1, 2) and agreed(state((2,), (1, 2))) == ()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 5), st.booleans())
def test_no_later_sound_changes_what_was_agreed(seed, beam, heard, with_model):
    """Neither the sound that comes nor any other: all results of all continuations begin with it."""
    decoder, joiner, sound = network(seed)
    search = TransducerSearch(decoder, joiner, beam=beam, model=Watching(lambda text: 0.3 * (text[-1] == 2), lambda text: -float(len(text))) if with_model else None)
    state = search.feed(sound[0, :heard], search.start())
    safe = agreed(state)
    assert all(h.tokens[: len(safe)] == safe for h in search.results(state))
    for following in (sound[0, heard:], sound[1], -3 * sound[2]):
        later = search.feed(following, state)
        assert all(h.tokens[: len(safe)] == safe for h in search.results(later)) and agreed(later)[: len(safe)] == safe
