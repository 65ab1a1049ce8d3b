"""Prefix beam search against all texts, with language models of several kinds, and at its limits."""
import functools
import itertools
import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from speechlearn.alignment.ctc import CTCHypothesis, ctc_greedy, ctc_loss
from speechlearn.alignment.language_model import END, START, NGramModel, train_ngram
from speechlearn.alignment.search import NoModel, WordFusion, prefix_beam_search
from speechlearn.text import CharacterVocabulary, SubwordVocabulary, WordVocabulary

SENTENCES = ["turn on the lamp", "turn on the light", "turn off the light"]


def ints(*values):
    return torch.tensor(values, dtype=torch.long)


def random_log_probs(seed, *shape, sharpness=1.5):
    return (sharpness * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).log_softmax(dim=-1)


@functools.lru_cache(maxsize=None)
def texts_of_paths(steps, vocab, blank):
    table = {}
    for path in itertools.product(range(vocab), repeat=steps):
        text = tuple(k for before, k in zip((None, *path), path) if k != before and k != blank)
        table.setdefault(text, []).append(path)
    return table


def all_texts(x, blank):
    """Probability of every text, from the list of all paths."""
    return {text: math.fsum(math.prod(math.exp(float(x[t, k])) for t, k in enumerate(path)) for path in paths) for text, paths in texts_of_paths(*x.shape, blank).items()}


def exact(x, text, blank=0):
    return -ctc_loss(x[None], torch.tensor([text], dtype=torch.long).reshape(1, -1), ints(len(x)), ints(len(text)), blank=blank, impossible="zero").item()


def search(x, beam=10_000, blank=0, **options):
    return prefix_beam_search(x[None], ints(len(x)), blank=blank, beam=beam, **options)[0]


class TestByHand:
    def test_the_best_path_is_not_the_best_text(self):
        x = torch.tensor([[0.6, 0.4], [0.6, 0.4]], dtype=torch.float64).log()
        found = search(x)
        assert [h.tokens for h in found] == [(1,), ()] and [math.exp(h.log_prob) for h in found] == pytest.approx([0.64, 0.36])
        assert all(h.spans == () and h.score == h.log_prob for h in found)
        assert ctc_greedy(x[None], ints(2), blank=0)[0].tokens == ()

    def test_a_second_letter_needs_a_blank(self):
        x = torch.tensor([[0.1, 0.9], [0.2, 0.8], [0.3, 0.7]], dtype=torch.float64).log()
        found = {h.tokens: math.exp(h.log_prob) for h in search(x)}
        assert found[1, 1] == pytest.approx(0.9 * 0.2 * 0.7) and found[()] == pytest.approx(0.1 * 0.2 * 0.3) and len(found) == 3

    def test_a_beam_of_one_follows_one_text(self):
        """After one step the blank leads; "a" is dropped, and begins anew. What its first step would have added is lost."""
        x = torch.tensor([[0.6, 0.4], [0.3, 0.7]], dtype=torch.float64).log()
        assert [(h.tokens, pytest.approx(math.exp(h.log_prob))) for h in search(x, beam=1)] == [((1,), 0.6 * 0.7)]
        assert math.exp(search(x)[0].log_prob) == pytest.approx(0.6 * 0.7 + 0.4 * 0.3 + 0.4 * 0.7)


class TestAgainstAllTexts:
    @settings(max_examples=80, deadline=None)
    @given(st.integers(0, 10**6), st.integers(0, 5), st.integers(2, 4), st.data())
    def test_a_beam_with_room_for_all(self, seed, steps, vocab, data):
        blank = data.draw(st.integers(0, vocab - 1))
        x = random_log_probs(seed, steps, vocab)
        truth = all_texts(x, blank)
        found = search(x, beam=len(truth) + data.draw(st.integers(0, 2)), blank=blank)
        assert {h.tokens for h in found} == set(truth) and len(found) == len(truth)
        for h in found:
            assert math.exp(h.log_prob) == pytest.approx(truth[h.tokens]) and h.score == h.log_prob
        assert [h.score for h in found] == sorted((h.score for h in found), reverse=True)

    @settings(max_examples=80, deadline=None)
    @given(st.integers(0, 10**6), st.integers(1, 12), st.integers(2, 6), st.integers(1, 8), st.booleans())
    def test_any_beam_gives_lower_bounds(self, seed, steps, vocab, beam, with_model):
        x = random_log_probs(seed, steps, vocab)
        found = search(x, beam=beam, model=Count() if with_model else None)
        assert 1 <= len(found) <= beam and len({h.tokens for h in found}) == len(found)
        for h in found:
            assert h.log_prob <= exact(x, h.tokens) + 1e-9

    def test_wide_beams_find_better_texts_than_narrow_ones(self):
        """Not in every single case: a wider beam may keep what a narrow one drops, and lose the best. But by and large."""
        cases = [random_log_probs(seed, 8, 4) for seed in range(30)]
        means = [sum(exact(x, search(x, beam=beam)[0].tokens) for x in cases) / len(cases) for beam in (1, 2, 4, 16, 40)]
        assert means == sorted(means) and means[-1] > means[0] + 0.05

    def test_no_symbol_too_much(self):
        x = random_log_probs(0, 4, 3)
        x[1:3, 1] = -math.inf  # then "a" can come first and last only
        truth = {text: p for text, p in all_texts(x, 0).items() if p > 0}
        assert {h.tokens: pytest.approx(math.exp(h.log_prob)) for h in search(x)} == truth

    @settings(max_examples=30, deadline=None)
    @given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 6)), min_size=1, max_size=4), st.integers(1, 5))
    def test_in_a_batch_as_alone(self, parts, beam):
        rows = [random_log_probs(seed, n, 4) for seed, n in parts]
        x = torch.full((len(rows), max(map(len, rows)) + 1, 4), math.nan, dtype=torch.float64)
        for place, row in zip(x, rows):
            place[: len(row)] = row
        assert prefix_beam_search(x, ints(*map(len, rows)), blank=0, beam=beam) == [search(row, beam=beam) for row in rows]

    def test_32_bits(self):
        x = random_log_probs(1, 40, 6)
        a, b = search(x, beam=8), search(x.float(), beam=8)
        assert [h.tokens for h in a] == [h.tokens for h in b] and [h.log_prob for h in a] == pytest.approx([h.log_prob for h in b], rel=1e-5)

    def test_no_steps(self):
        assert search(torch.zeros(0, 3)) == [CTCHypothesis((), (), 0.0, 0.0)]


class TestThresholdAndNever:
    def test_what_lies_below_the_threshold_is_not_tried(self):
        x = torch.tensor([[0.4, 0.35, 0.25], [0.4, 0.25, 0.35]]).double().log()
        everything, some, none = (search(x, threshold=t) for t in (-math.inf, math.log(0.3), math.log(0.5)))
        assert {h.tokens for h in everything} == {(), (1,), (2,), (1, 2), (2, 1)}
        assert {h.tokens for h in some} == {(), (1,), (2,), (1, 2)} and [h.tokens for h in none] == [()]
        sums = {h.tokens: math.exp(h.log_prob) for h in some}
        # A symbol that may not be written anew may still last: a∅, and aa with 0.25 at the second step.
        assert sums[1,] == pytest.approx(0.35 * 0.4 + 0.35 * 0.25) and sums[2,] == pytest.approx(0.4 * 0.35)

    def test_at_the_threshold_is_not_below_it(self):
        x = torch.tensor([[-1.0, -1.5, -2.0]], dtype=torch.float64)
        assert {h.tokens for h in search(x, threshold=-1.5)} == {(), (1,)}
        impossible = torch.tensor([[-1.0, -1.0, -math.inf]], dtype=torch.float64)
        assert {h.tokens for h in search(impossible)} == {(), (1,)}

    @settings(max_examples=30, deadline=None)
    @given(st.integers(0, 10**6), st.floats(-6, 0))
    def test_a_threshold_only_takes_away(self, seed, threshold):
        x = random_log_probs(seed, 5, 3)
        everything = {h.tokens: h.log_prob for h in search(x)}
        for h in search(x, threshold=threshold):
            assert h.log_prob <= everything[h.tokens] + 1e-12

    @settings(max_examples=30, deadline=None)
    @given(st.integers(0, 10**6), st.sets(st.integers(0, 3)))
    def test_never(self, seed, never):
        x = random_log_probs(seed, 4, 4)
        allowed = {text: p for text, p in all_texts(x, 0).items() if not never & set(text)}  # the blank stays, whatever we forbid
        assert {h.tokens: pytest.approx(math.exp(h.log_prob)) for h in search(x, never=tuple(never))} == allowed

    def test_nothing_but_the_impossible(self):
        x = torch.full((1, 2, 3), -math.inf)
        x[:, :, 1] = 0
        assert search(x[0], never=(1,)) == []


class Count(NoModel):
    """Likes every symbol by half a point, and the end of an even number of them by one."""

    def start(self):
        return 0

    def step(self, state, symbol):
        return 0.5, state + 1

    def finish(self, state):
        return 1.0 - state % 2


class TestModels:
    @settings(max_examples=40, deadline=None)
    @given(st.integers(0, 10**6), st.integers(0, 5))
    def test_scores_add_up(self, seed, steps):
        x = random_log_probs(seed, steps, 3)
        truth = all_texts(x, 0)
        found = search(x, model=Count())
        assert {h.tokens for h in found} == set(truth)
        for h in found:
            assert h.log_prob == pytest.approx(math.log(truth[h.tokens])) and h.score == pytest.approx(h.log_prob + 0.5 * len(h.tokens) + 1 - len(h.tokens) % 2)
        assert [h.score for h in found] == sorted((h.score for h in found), reverse=True)

    def test_no_model_changes_nothing(self):
        x = random_log_probs(2, 8, 4)
        assert search(x, beam=4) == search(x, beam=4, model=NoModel())

    def test_each_prefix_is_scored_from_its_own_state(self):
        seen = set()

        class Spy(NoModel):
            def start(self):
                return ()

            def step(self, state, symbol):
                seen.add((*state, symbol))
                return 0.0, (*state, symbol)

            def finish(self, state):
                ended.append(state)
                return 0.0

        ended = []
        found = search(random_log_probs(3, 4, 3), model=Spy())
        assert sorted(ended) == sorted(h.tokens for h in found) and seen >= {h.tokens for h in found if h.tokens}

    def test_a_model_steers_the_search_and_not_only_the_ranking(self):
        """With a beam of one, a text survives only if the model speaks while the search goes on."""
        x = torch.tensor([[0.1, 0.6, 0.3], [0.9, 0.05, 0.05]], dtype=torch.float64).log()

        class Second(NoModel):
            def step(self, state, symbol):
                return (3.0 if symbol == 2 else 0.0), None

        assert search(x, beam=1)[0].tokens == (1,) and search(x, beam=1, model=Second())[0].tokens == (2,)

    def test_what_is_forbidden_is_missing(self):
        class NotTwice(NoModel):
            def start(self):
                return frozenset()

            def step(self, state, symbol):
                return (-math.inf if symbol in state else 0.0), state | {symbol}

            def finish(self, state):
                return 0.0 if 2 in state else -math.inf

        x = random_log_probs(4, 5, 4)
        truth = {text: p for text, p in all_texts(x, 0).items() if len(set(text)) == len(text) and 2 in text}
        assert {h.tokens: pytest.approx(math.exp(h.log_prob)) for h in search(x, model=NotTwice())} == truth

    def test_everything_forbidden_is_an_empty_list(self):
        class Nothing(NoModel):
            def finish(self, state):
                return -math.inf

        x = random_log_probs(5, 2, 4, 3)
        assert prefix_beam_search(x, ints(4, 0), blank=0, beam=5, model=Nothing()) == [[], []]

    def test_a_model_that_is_an_empty_collection_is_still_a_model(self):
        class Listed(Count):
            def __len__(self):
                return 0

        x = random_log_probs(6, 4, 3)
        assert search(x, model=Listed()) == search(x, model=Count())


class TestErrors:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (dict(beam=0), "beam is 0; it must be at least 1"),
            (dict(beam=-3), "beam is -3"),
            (dict(lengths=ints(5, 6)), r"lengths \[5, 6\] do not fit log_probs of shape \(2, 5, 3\)"),
            (dict(lengths=ints(-1, 5)), "do not fit"),
            (dict(blank=3), "blank is 3; it must be one of the 3 symbols of log_probs"),
            (dict(blank=-1), "blank is -1"),
            (dict(log_probs=torch.ones(2, 5, 3)), "log_probs has the value 1; log-probabilities are never above 0. Apply log_softmax"),
        ],
    )
    def test_what_does_not_fit(self, options, message):
        arguments = dict(log_probs=random_log_probs(0, 2, 5, 3), lengths=ints(5, 4), blank=0, beam=3)
        assert len(prefix_beam_search(**arguments)) == 2
        with pytest.raises(ValueError, match=message):
            prefix_beam_search(**arguments | options)

    def test_nan(self):
        x = random_log_probs(0, 2, 5, 3)
        x[1, 3, 1] = math.nan
        with pytest.raises(ArithmeticError, match="the log-probabilities of utterance 1 hold NaN"):
            prefix_beam_search(x, ints(5, 4), blank=0, beam=2)
        assert prefix_beam_search(x, ints(5, 3), blank=0, beam=2)[1] == search(x[1, :3], beam=2)

    def test_weight(self):
        with pytest.raises(ValueError, match="weight is -0.5; a language model with a negative weight would prefer what is unlikely"):
            WordFusion(train_ngram(SENTENCES), CharacterVocabulary(), weight=-0.5)


class Pieces:
    """Subwords as sentencepiece writes them: ▁ begins a word. Without specials but the blank."""

    kind, symbols = "subwords", ["▁", "▁a", "b", "▁ba", "a"]

    def __len__(self):
        return 1 + len(self.symbols)

    def decode(self, tokens):
        return "".join(self.symbols[t - 1] for t in tokens).replace("▁", " ").strip()


def spoken(fusion, tokens):
    """Score of a text, symbol by symbol."""
    state, total = fusion.start(), 0.0
    for token in tokens:
        score, state = fusion.step(state, token)
        total += score
    return total + fusion.finish(state)


def by_sentence(ngram, text, weight, bonus):
    return weight * ngram.score(text) + bonus * len(text.split())


REAL = SubwordVocabulary.train(SENTENCES * 5 + ["on the lamp turn the light off"], 30)
VOCABULARIES = {"characters": CharacterVocabulary(), "words": WordVocabulary("turn on off the lamp light".split()), "subwords": REAL}


class TestFusion:
    @pytest.mark.parametrize("kind", VOCABULARIES)
    @settings(max_examples=40, deadline=None)
    @given(words=st.lists(st.sampled_from("turn on off the lamp light".split()), min_size=1, max_size=6), order=st.integers(1, 4), weight=st.floats(0, 2), bonus=st.floats(-2, 2))
    @example(words=["light"], order=3, weight=0.0, bonus=0.5)
    def test_a_text_gets_the_score_of_its_sentence(self, kind, words, order, weight, bonus):
        vocabulary, ngram, text = VOCABULARIES[kind], train_ngram(SENTENCES, order=order), " ".join(words)
        tokens = vocabulary.encode(text)
        for closed in (False, True):
            fusion = WordFusion(ngram, vocabulary, weight=weight, word_bonus=bonus, closed=closed)
            assert spoken(fusion, tokens) == pytest.approx(by_sentence(ngram, text, weight, bonus))

    def test_real_pieces_are_of_all_kinds(self):
        """So that the test above says something: pieces that begin a word, that go on, and the mark alone."""
        used = {REAL.symbols[t - 5] for s in SENTENCES for t in REAL.encode(s)}
        assert any(piece.startswith("▁") and len(piece) > 1 for piece in used) and any(not piece.startswith("▁") for piece in used) and "▁" in REAL.symbols

    @pytest.mark.parametrize("weight", [0.0, 0.5])
    @pytest.mark.parametrize(
        ("tokens", "text"), [((2, 3, 4), "ab ba"), ((1, 5, 3), "ab"), ((1, 1, 2), "a"), ((5, 3, 1), "ab"), ((2, 1, 3, 5), "a ba"), ((), ""), ((1,), ""), ((4, 4, 5), "ba baa")]
    )
    def test_pieces(self, tokens, text, weight):
        ngram = train_ngram(["ab ba", "a ba", "ab"], order=2)
        assert Pieces().decode(tokens).split() == text.split()
        assert spoken(WordFusion(ngram, Pieces(), weight=weight, word_bonus=0.3), tokens) == pytest.approx(by_sentence(ngram, text, weight, 0.3))

    def test_spaces_at_the_ends_and_in_a_row(self):
        vocabulary, ngram = CharacterVocabulary(), train_ngram(SENTENCES)
        fusion = WordFusion(ngram, vocabulary, weight=0.8, word_bonus=-0.4)
        for text in (" turn on", "turn  on", "turn on ", "  ", ""):
            tokens = [vocabulary.encode(c)[0] for c in text]
            assert spoken(fusion, tokens) == pytest.approx(by_sentence(ngram, text, 0.8, -0.4)), repr(text)

    def test_a_word_is_scored_at_its_end_and_the_end_at_the_end(self):
        vocabulary, ngram = CharacterVocabulary(), train_ngram(SENTENCES)
        fusion = WordFusion(ngram, vocabulary, weight=2.0, word_bonus=0.1)
        state = fusion.start()
        for letter in vocabulary.encode("turn"):
            score, state = fusion.step(state, letter)
            assert score == 0
        score, state = fusion.step(state, vocabulary.encode("a b")[1])
        assert score == pytest.approx(2 * ngram.log_prob("turn", (START,)) + 0.1)
        assert fusion.finish(state) == pytest.approx(2 * ngram.log_prob(END, (START, "turn")))

    def test_words_that_the_model_does_not_know(self):
        vocabulary, ngram = CharacterVocabulary(), train_ngram(SENTENCES)
        tokens = vocabulary.encode("turn it")
        assert spoken(WordFusion(ngram, vocabulary), tokens) == pytest.approx(0.5 * ngram.score("turn it")) and ngram.score("turn it") > -math.inf
        assert spoken(WordFusion(ngram, vocabulary, closed=True), tokens) == -math.inf
        without = NGramModel({ngram_: p for ngram_, p in ngram.log_probs.items() if ngram_ != ("<unk>",)}, ngram.log_backoffs)
        assert spoken(WordFusion(without, vocabulary, word_bonus=9.0), tokens) == -math.inf
        assert spoken(WordFusion(without, vocabulary, weight=0.0, word_bonus=9.0), tokens) == pytest.approx(18)

    def test_closed_stops_at_the_first_letter_that_leads_nowhere(self):
        vocabulary = CharacterVocabulary()
        fusion = WordFusion(train_ngram(SENTENCES), vocabulary, closed=True)
        for text, place in (("turm", 3), ("x", 0), ("turn onn", 7), ("lamps", 4), ("tu on", 2)):
            state, scores = fusion.start(), []
            for token in (vocabulary.encode(c)[0] for c in text):
                score, state = fusion.step(state, token)
                scores.append(score)
            assert [s == -math.inf for s in scores].index(True) == place, text
        half = fusion.start()
        for token in vocabulary.encode("la"):
            _, half = fusion.step(half, token)
        assert fusion.finish(half) == -math.inf  # half a word is none

    def test_closed_looks_at_the_letters_that_begin_the_next_word(self):
        fusion = WordFusion(train_ngram(["ab", "ab ab"]), Pieces(), closed=True)
        _, state = fusion.step(fusion.step(fusion.start(), 2)[1], 3)  # ▁a b
        assert fusion.step(state, 2)[0] > -math.inf and fusion.step(state, 4)[0] == -math.inf  # ▁a may follow; no word begins with ba

    @pytest.mark.parametrize("vocabulary", [CharacterVocabulary(), WordVocabulary(["a", "b", "zebra"])], ids=lambda v: v.kind)
    def test_after_an_unknown_word(self, vocabulary):
        """A model may know what follows words that it does not know."""
        ngram = NGramModel({(END,): -1.0, ("<unk>",): -3.0, ("a",): -1.0, ("b",): -2.0, ("<unk>", "b"): -0.1}, {("<unk>",): -0.7})
        for text in ("zebra b", "zebra a", "a zebra", "zebra zebra b"):
            assert spoken(WordFusion(ngram, vocabulary, weight=0.6, word_bonus=0.1), vocabulary.encode(text)) == pytest.approx(by_sentence(ngram, text, 0.6, 0.1))

    @pytest.mark.parametrize("closed", [False, True])
    @pytest.mark.parametrize("kind", VOCABULARIES)
    def test_special_symbols_are_never_written(self, kind, closed):
        fusion = WordFusion(train_ngram(SENTENCES), VOCABULARIES[kind], closed=closed)
        assert all(fusion.step(fusion.start(), special)[0] == -math.inf for special in range(5))


class TestFusionInTheSearch:
    sentences = ["ab ba", "ba ab", "ab", "a"]

    def cases(self):
        letters = CharacterVocabulary(" ab")
        yield letters, random_log_probs(7, 5, len(letters))
        yield Pieces(), random_log_probs(8, 4, len(Pieces()))
        words = WordVocabulary(["ab", "ba", "a", "bb"])
        yield words, random_log_probs(9, 4, len(words))

    @pytest.mark.parametrize("number", range(3))
    def test_score_is_the_sum_of_both_opinions(self, number):
        vocabulary, x = list(self.cases())[number]
        ngram = train_ngram(self.sentences, order=2)
        specials = tuple(range(1, len(vocabulary) - len(vocabulary.symbols)))
        found = search(x, model=WordFusion(ngram, vocabulary, weight=0.7, word_bonus=0.2))
        alone = {h.tokens: h.log_prob for h in search(x, never=specials)}
        assert {h.tokens for h in found} == set(alone)
        for h in found:
            assert h.log_prob == pytest.approx(alone[h.tokens])
            assert h.score == pytest.approx(h.log_prob + by_sentence(ngram, vocabulary.decode(h.tokens), 0.7, 0.2))

    @pytest.mark.parametrize("number", range(3))
    def test_closed(self, number):
        vocabulary, x = list(self.cases())[number]
        ngram = train_ngram(self.sentences, order=2)
        fusion = dict(weight=0.7, word_bonus=0.2)
        everything = search(x, model=WordFusion(ngram, vocabulary, **fusion))
        known = [h for h in everything if set(vocabulary.decode(h.tokens).split()) <= {"ab", "ba", "a"}]
        found = search(x, model=WordFusion(ngram, vocabulary, closed=True, **fusion))
        assert {h.tokens: pytest.approx(h.score) for h in found} == {h.tokens: h.score for h in known} and 0 < len(known) < len(everything)

    def test_a_word_that_sounds_like_another(self):
        vocabulary = CharacterVocabulary("bt a")
        x = torch.full((4, len(vocabulary)), 1e-3, dtype=torch.float64)
        for t, options in enumerate(({"t": 0.9}, {"a": 0.9}, {"b": 0.5, "t": 0.45}, {"": 0.9})):
            for letter, probability in options.items():
                x[t, vocabulary.encode(letter)[0] if letter else 0] = probability
        x = x.log()
        ngram = train_ngram(["tat"] * 9 + ["tab"])
        best = {weight: vocabulary.decode(search(x, beam=50, model=WordFusion(ngram, vocabulary, weight=weight))[0].tokens) for weight in (0.0, 0.5)}
        assert best == {0.0: "tab", 0.5: "tat"}
