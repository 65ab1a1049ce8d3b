"""Language model, prefix search, forced alignment and transducer search: by hand, by enumeration, and as identities."""
import itertools
import math
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speechlearn.alignment.ctc import collapse, ctc_loss
from speechlearn.alignment.forced import Alignment, AlignedWord, forced_alignment, measured_shifts, plot_words, word_times
from speechlearn.alignment.language_model import NGramModel, read_arpa, train_ngram, write_arpa
from speechlearn.alignment.recogniser import AlignmentRecogniser, AlignmentRecogniserConfig
from speechlearn.alignment.search import WordFusion, prefix_beam_search
from speechlearn.alignment.transducer import Decoder, Joiner, transducer_loss
from speechlearn.alignment.transducer_search import TransducerSearch, agreed, transducer_greedy
from speechlearn.data.batches import Batch, assert_batch_independent
from speechlearn.text import CharacterVocabulary, SubwordVocabulary, WordVocabulary

SENTENCES = ["turn on the lamp", "turn on the light", "turn off the light"]


def tensor(values):
    return torch.tensor(values, dtype=torch.long)


def log_probs_of(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype).log_softmax(dim=-1)


# ---- language model ---------------------------------------------------------------------------------------------


def test_witten_bell_by_hand():
    model = train_ngram(SENTENCES, order=2)
    assert math.exp(model.log_prob("lamp", ())) == pytest.approx((1 + 7 / 8) / 22)
    assert math.exp(model.log_prob("lamp", ("the",))) == pytest.approx((1 + 2 * (1 + 7 / 8) / 22) / 5)
    assert math.exp(model.log_prob("never heard", ())) == pytest.approx((7 / 8) / 22)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.sampled_from("abcd"), max_size=6).map(" ".join), min_size=1, max_size=8), st.integers(1, 4), st.lists(st.sampled_from(["<s>", *"abcdx"]), max_size=4))
def test_probabilities_after_any_context_sum_to_one_and_equal_the_interpolated_formula(sentences, order, context):
    model = train_ngram(sentences, order=order)
    words = [*model.words, "</s>", "<unk>"]
    assert sum(math.exp(model.log_prob(word, tuple(context))) for word in words) == pytest.approx(1)

    marked = [("<s>", *s.split(), "</s>") for s in sentences]

    def interpolated(word, h):
        if h is None:
            return 1 / len(words)
        followers = [m[i] for m in marked for i in range(max(1, len(h)), len(m)) if m[i - len(h) : i] == h]
        shorter = interpolated(word, h[1:] if h else None)
        return (followers.count(word) + len(set(followers)) * shorter) / (len(followers) + len(set(followers))) if followers else shorter

    known = tuple(w if (w,) in model.log_probs or w == "<s>" else "<unk>" for w in context)
    cut = known[max(0, len(known) - order + 1) :]
    for word in words:
        assert math.exp(model.log_prob(word, tuple(context))) == pytest.approx(interpolated(word, cut), rel=1e-9) or "<unk>" in cut or "<s>" in cut[1:]


def test_arpa_round_trip_and_a_file_by_hand(tmp_path):
    model = train_ngram(SENTENCES, order=3)
    write_arpa(model, tmp_path / "m.arpa")
    again = read_arpa(tmp_path / "m.arpa")
    for sentence in (*SENTENCES, "turn the lamp off", "dim it"):
        assert again.score(sentence) == pytest.approx(model.score(sentence), rel=1e-6)
    (tmp_path / "hand.arpa").write_text(
        "head that is no data\n\\data\\\nngram 1=4\nngram 2=2\nngram 3=1\n\n\\1-grams:\n-1.0\ta\t-0.5\n-2.0\tb\t-0.25\n-0.5\t</s>\n-99\t<s>\t-0.1\n\n"
        "\\2-grams:\n-0.3\t<s> a\t-0.2\n-0.4\ta b\n\n\\3-grams:\n-0.05\t<s> a b\n\n\\end\\\n"
    )
    hand = read_arpa(tmp_path / "hand.arpa")
    ten = math.log(10)
    assert hand.log_prob("b", ("<s>", "a")) == pytest.approx(-0.05 * ten)
    assert hand.log_prob("a", ("<s>", "a")) == pytest.approx((-0.2 - 0.5 - 1.0) * ten)  # back off twice: from (<s> a), then from (a)
    assert hand.log_prob("b", ("b", "a")) == pytest.approx(-0.4 * ten)  # (b a) was never seen: weight one
    assert hand.log_prob("c", ()) == -math.inf and hand.order == 3
    assert hand.score("a b") == pytest.approx((-0.3 - 0.05 - 0.25 - 0.5) * ten)
    assert hand.perplexity(["a b"]) == pytest.approx(math.exp(1.1 * ten / 3))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("\\data\\", "data", "not an ARPA file"),
        ("\\end\\", "", "cut off"),
        ("ngram 1=9", "ngram 1=8", "head says 8 1-grams, but there are 9"),
        ("ngram 1=9", "ngram one", "expected 'ngram N=COUNT'"),
        ("\\2-grams:", "\\5-grams:", "not one of the sections"),
        ("\tlamp\t", "\tlamp light off\t", "expected a logarithm, 1 words"),
        ("-99", "nan", "expected a logarithm"),
    ],
)
def test_damaged_arpa_files_are_named(tmp_path, old, new, message):
    path = tmp_path / "m.arpa"
    write_arpa(train_ngram(SENTENCES, order=2), path)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(ValueError, match=message):
        read_arpa(path)


def test_writing_is_atomic_and_bad_models_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "m.arpa"
    path.write_text("old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_arpa(train_ngram(SENTENCES), path)
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["m.arpa"]
    with pytest.raises(ValueError, match="order is 0"):
        train_ngram(SENTENCES, order=0)
    with pytest.raises(ValueError, match="contains '<s>'"):
        train_ngram(["a <s> b"])
    with pytest.raises(ValueError, match="no sentences"):
        train_ngram([])
    with pytest.raises(ValueError, match="no entry for '</s>'"):
        NGramModel({("a",): -1.0}, {})
    with pytest.raises(ValueError, match="must not be above 0"):
        NGramModel({("a",): 1.0, ("</s>",): -1.0}, {})


# ---- prefix search ------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 4), st.integers(2, 3), st.data())
def test_a_beam_that_holds_everything_is_exact(seed, steps, vocab, data):
    blank = data.draw(st.integers(0, vocab - 1))
    x = log_probs_of(seed, 1, max(1, steps), vocab)
    sums = {}
    for path in itertools.product(range(vocab), repeat=steps):
        text = tuple(collapse(path, blank=blank))
        sums[text] = sums.get(text, 0.0) + math.exp(sum(float(x[0, t, k]) for t, k in enumerate(path)))
    found = prefix_beam_search(x, tensor([steps]), blank=blank, beam=10_000)[0]
    assert {h.tokens for h in found} == set(sums)
    assert all(math.exp(h.log_prob) == pytest.approx(sums[h.tokens]) for h in found)
    assert [h.score for h in found] == sorted((h.score for h in found), reverse=True)


@pytest.mark.parametrize("beam", [1, 2, 5])
def test_a_narrow_beam_gives_lower_bounds(beam):
    for seed in range(20):
        x = log_probs_of(seed, 1, 12, 5)
        for h in prefix_beam_search(x, tensor([12]), blank=0, beam=beam)[0]:
            exact = -ctc_loss(x, tensor([h.tokens]).reshape(1, -1), tensor([12]), tensor([len(h.tokens)]), blank=0).item()
            assert h.log_prob <= exact + 1e-9


def test_search_limits_and_errors():
    x = log_probs_of(0, 2, 6, 5)
    assert all(3 not in h.tokens for h in prefix_beam_search(x, tensor([6, 4]), blank=0, beam=50, never=(3,))[1])
    assert prefix_beam_search(x, tensor([6, 0]), blank=0, beam=3)[1][0].tokens == ()
    everything, some = (prefix_beam_search(x[:1], tensor([6]), blank=0, beam=5000, threshold=t)[0] for t in (-math.inf, -1.0))
    assert {h.tokens for h in some} < {h.tokens for h in everything}
    with pytest.raises(ValueError, match="beam is 0"):
        prefix_beam_search(x, tensor([6, 6]), blank=0, beam=0)
    with pytest.raises(ValueError, match="do not fit"):
        prefix_beam_search(x, tensor([6, 7]), blank=0, beam=1)
    with pytest.raises(ValueError, match="negative weight"):
        WordFusion(train_ngram(["a"]), CharacterVocabulary(), weight=-1.0)


VOCABULARIES = {
    "letters": CharacterVocabulary(),
    "words": WordVocabulary("turn on off the lamp light".split()),
    "subwords": SubwordVocabulary.train(SENTENCES * 20, 24),
}


@pytest.mark.parametrize("kind", VOCABULARIES)
@pytest.mark.parametrize("text", ["turn on the light", "light", "turn off", "on on"])
def test_fusion_scores_a_text_as_the_language_model_does(kind, text):
    vocabulary, ngram = VOCABULARIES[kind], train_ngram(SENTENCES, order=3)
    fusion = WordFusion(ngram, vocabulary, weight=0.7, word_bonus=0.3)
    state, total = fusion.start(), 0.0
    for token in vocabulary.encode(text):
        score, state = fusion.step(state, token)
        total += score
    assert total + fusion.finish(state) == pytest.approx(0.7 * ngram.score(text) + 0.3 * len(text.split()))
    assert fusion.step(fusion.start(), vocabulary.blank)[0] == -math.inf  # special symbols are never written


def test_search_with_fusion_adds_the_score_and_a_closed_vocabulary_knows_only_its_words():
    vocabulary = CharacterVocabulary(" abc")
    ngram = train_ngram(["ab c", "c ab", "c"], order=2)
    x = log_probs_of(1, 1, 5, len(vocabulary))
    specials = tuple(range(1, len(vocabulary) - 4))
    fusion = WordFusion(ngram, vocabulary, weight=0.5, word_bonus=0.2)
    for h in prefix_beam_search(x, tensor([5]), blank=0, beam=3000, model=fusion, never=specials)[0]:
        text = vocabulary.decode(h.tokens)
        assert h.score == pytest.approx(h.log_prob + 0.5 * ngram.score(text) + 0.2 * len(text.split()))
    closed = prefix_beam_search(x, tensor([5]), blank=0, beam=3000, model=WordFusion(ngram, vocabulary, closed=True), never=specials)[0]
    assert closed and all(set(vocabulary.decode(h.tokens).split()) <= {"ab", "c"} for h in closed)

    class Nothing(WordFusion):
        def finish(self, state):
            return -math.inf

    assert prefix_beam_search(x, tensor([5]), blank=0, beam=5, model=Nothing(ngram, vocabulary))[0] == []


# ---- forced alignment -----------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6), st.lists(st.integers(1, 2), max_size=3))
def test_alignment_equals_the_best_of_all_paths(seed, steps, text):
    x = log_probs_of(seed, 1, steps, 3)
    paths = [p for p in itertools.product(range(3), repeat=steps) if collapse(p, blank=0) == text]
    args = x, tensor([text]).reshape(1, -1), tensor([steps]), tensor([len(text)])
    if not paths:
        with pytest.raises(ValueError, match="does not fit into"):
            forced_alignment(*args, blank=0)
        return
    scores = {p: sum(float(x[0, t, k]) for t, k in enumerate(p)) for p in paths}
    found = forced_alignment(*args, blank=0)[0]
    assert found.path == max(scores, key=scores.get) and found.log_prob == pytest.approx(max(scores.values()))
    assert found.log_prob <= -ctc_loss(*args, blank=0).item() + 1e-9
    for token, (first, last), sure in zip(found.tokens, found.spans, found.log_probs, strict=True):
        assert found.path[first : last + 1] == (token,) * (last - first + 1)
        assert sure == pytest.approx(float(x[0, first : last + 1, token].max()))


def test_alignment_in_a_batch_and_its_errors():
    x, targets = log_probs_of(2, 2, 7, 4), tensor([[1, 1, 2], [3, -1, -1]])
    both = forced_alignment(x, targets, tensor([7, 4]), tensor([3, 1]), blank=0)
    assert both[1] == forced_alignment(x[1:, :4], targets[1:, :1], tensor([4]), tensor([1]), blank=0)[0]
    with pytest.raises(ValueError, match="target 0 has symbol 0 at place 1: this is the blank"):
        forced_alignment(x, tensor([[1, 0, 2], [3, 1, 1]]), tensor([7, 4]), tensor([3, 1]), blank=0)
    x[0, :, 2] = -math.inf
    with pytest.raises(ValueError, match="text 0 has probability zero"):
        forced_alignment(x, targets, tensor([7, 4]), tensor([3, 1]), blank=0)
    x[1, 1, 1] = math.nan
    with pytest.raises(ArithmeticError, match="utterance 1"):
        forced_alignment(x[:, :, :], targets, tensor([0, 4]), tensor([0, 1]), blank=0)


def test_word_times():
    letters = CharacterVocabulary()
    tokens = tuple(letters.encode("ab c"))
    aligned = Alignment(tokens, ((1, 1), (2, 3), (4, 4), (6, 7)), (math.log(0.5), math.log(0.125), 0.0, -1.0), (0,) * 9, -3.0)
    words = word_times(aligned, letters, frame_seconds=0.04)
    assert [(w.text, round(w.start, 6), round(w.end, 6)) for w in words] == [("ab", 0.04, 0.16), ("c", 0.24, 0.32)]
    assert [w.confidence for w in words] == pytest.approx([0.25, math.exp(-1)])
    moved = word_times(aligned, letters, frame_seconds=0.04, start_shift=-0.1, end_shift=0.1, seconds=0.3)
    assert [(w.start, round(w.end, 6)) for w in moved] == [(0.0, 0.26), (pytest.approx(0.14), 0.3)]
    one = VOCABULARIES["words"]
    two = Alignment(tuple(one.encode("turn off")), ((0, 1), (3, 3)), (0.0, 0.0), (0,) * 5, 0.0)
    assert [w.text for w in word_times(two, one, frame_seconds=0.1)] == ["turn", "off"]
    pieces = VOCABULARIES["subwords"].encode("turn off")
    spread = Alignment(tuple(pieces), tuple((i, i) for i in range(len(pieces))), (0.0,) * len(pieces), (), 0.0)
    assert [w.text for w in word_times(spread, VOCABULARIES["subwords"], frame_seconds=0.1)] == ["turn", "off"]
    assert measured_shifts([0.06, 0.05, 0.2], [-0.01, 0.0, 0.02]) == (-0.06, -0.0)
    with pytest.raises(ValueError, match="no errors were measured"):
        measured_shifts([], [0.1])
    assert plot_words(torch.zeros(1600), [AlignedWord("a", 0.0, 0.05, 0.9)], 16_000).get_xlabel() == "time (s)"


# ---- transducer search ------------------------------------------------------------------------------------------------


def small_transducer(seed=0, vocab=3, dim=8):
    torch.manual_seed(seed)
    decoder, joiner = Decoder(vocab, dim, 0, 2).eval(), Joiner(dim, dim, dim, vocab).eval()
    return decoder, joiner, 3 * torch.randn(2, 5, dim)


def test_unlimited_transducer_search_equals_the_loss():
    decoder, joiner, sound = small_transducer()
    search = TransducerSearch(decoder, joiner, beam=10_000, max_symbols=3)
    found = {h.tokens: h.log_prob for h in search.results(search.feed(sound[0, :2], search.start()))}
    for n in range(4):
        for text in itertools.product((1, 2), repeat=n):
            logits = joiner(sound[:1, :2, None], decoder(tensor([[0, *text]]))[:, None]).detach()
            exact = -transducer_loss(logits, tensor([text]).reshape(1, -1), tensor([2]), tensor([n]), blank=0).item()
            assert found[text] == pytest.approx(exact, abs=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 50), st.integers(1, 4), st.lists(st.integers(1, 4), max_size=4))
def test_feeding_in_pieces_changes_nothing_and_agreed_beginnings_stay(seed, beam, cuts):
    decoder, joiner, sound = small_transducer(seed)
    search = TransducerSearch(decoder, joiner, beam=beam)
    at_once = search.results(search.feed(sound[0], search.start()))
    state, safe = search.start(), ()
    edges = [0, *sorted(set(cuts)), 5]
    for first, last in zip(edges, edges[1:]):
        before = search.results(state)
        following = search.feed(sound[0, first:last], state)
        assert search.results(state) == before  # a state is a value
        state = following
        assert agreed(state)[: len(safe)] == safe
        safe = agreed(state)
    in_pieces = search.results(state)
    assert [h.tokens for h in in_pieces] == [h.tokens for h in at_once]
    assert [h.log_prob for h in in_pieces] == pytest.approx([h.log_prob for h in at_once], abs=1e-4)


def test_transducer_greedy_equals_a_plain_loop_and_respects_its_limit():
    for seed in range(10):
        decoder, joiner, sound = small_transducer(seed)
        lengths = tensor([5, 3])
        for limit in (1, 3):
            together = transducer_greedy(sound, lengths, decoder=decoder, joiner=joiner, max_symbols=limit)
            for i, n in enumerate(lengths.tolist()):
                tokens, steps, total = [], [], 0.0
                for t in range(n):
                    for written in range(limit + 1):
                        context = tensor([([-1, 0] + tokens)[-2:]])
                        lp = joiner(sound[i : i + 1, t], decoder(context, need_pad=False)[:, 0]).log_softmax(dim=-1)[0].detach()
                        best = int(lp.argmax())
                        if best == 0 or written == limit:
                            total += lp[0].item()
                            break
                        tokens.append(best)
                        steps.append(t)
                        total += lp[best].item()
                assert together[i].tokens == tuple(tokens) and together[i].steps == tuple(steps)
                assert together[i].log_prob == pytest.approx(total, abs=1e-4)


def test_transducer_search_errors_and_never():
    decoder, joiner, sound = small_transducer()
    with pytest.raises(ValueError, match="both must be at least 1"):
        TransducerSearch(decoder, joiner, beam=0)
    with pytest.raises(ValueError, match="max_symbols is 0"):
        transducer_greedy(sound, tensor([5, 5]), decoder=decoder, joiner=joiner, max_symbols=0)
    search = TransducerSearch(decoder, joiner, beam=20, never=(2,))
    assert all(2 not in h.tokens for h in search.results(search.feed(sound[0], search.start())))
    with pytest.raises(ArithmeticError, match="NaN at step 0"):
        search.feed(sound[0] * math.nan, search.start())
    with pytest.raises(ArithmeticError, match="NaN at step 0"):
        transducer_greedy(sound * math.nan, tensor([5, 5]), decoder=decoder, joiner=joiner)


# ---- the recogniser ---------------------------------------------------------------------------------------------------


def tiny_recogniser(head, **more):
    torch.manual_seed(0)
    return AlignmentRecogniser(AlignmentRecogniserConfig(vocab=8, head=head, n_bins=8, d_model=32, n_heads=2, n_layers=1, d_feedforward=64, decoder_dim=16, joiner_dim=32, warm_steps=30, dropout=0.0, **more))


def tiny_batch(n_frames=(48, 40)):
    g = torch.Generator().manual_seed(1)
    features = torch.randn(2, max(n_frames), 8, generator=g)
    return Batch(features, tensor(n_frames), tensor([[5, 6, 6], [7, 5, 1]]), tensor([3, 2]), ["a", "b"], ["u0", "u1"])


@pytest.mark.parametrize("head", ["ctc", "transducer", "both"])
def test_recogniser_learns_a_batch_by_heart_and_does_not_mix_utterances(head):
    model, batch = tiny_recogniser(head), tiny_batch()
    optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(120):
        optimiser.zero_grad()
        model.loss(batch)["loss"].backward()
        optimiser.step()
    model.eval()
    assert_batch_independent(model, batch.features, batch.feature_lengths, atol=1e-4)
    encoder_out, steps = model(batch.features, batch.feature_lengths)
    if head != "transducer":
        assert prefix_beam_search(model.ctc_log_probs(encoder_out), steps, blank=0, beam=4)[0][0].tokens == (5, 6, 6)
    if head != "ctc":
        found = transducer_greedy(encoder_out, steps, decoder=model.decoder, joiner=model.joiner)
        assert [h.tokens for h in found] == [(5, 6, 6), (7, 5)]
        assert int(model.trained_steps) == 120


def test_recogniser_says_what_does_not_fit():
    with pytest.raises(ValueError, match="choose ctc, transducer or both"):
        AlignmentRecogniserConfig(vocab=8, head="attention")
    with pytest.raises(ValueError, match="fast_emit"):
        AlignmentRecogniserConfig(vocab=8, fast_emit=-1.0)
    model, batch = tiny_recogniser("transducer").eval(), tiny_batch()
    with pytest.raises(ValueError, match="no CTC head"):
        model.ctc_log_probs(torch.zeros(1, 1, 32))
    with pytest.raises(ValueError, match="way is 'greedy'"):
        model.recognise(batch.features, batch.feature_lengths, CharacterVocabulary(" ab"), way="greedy")


def test_recogniser_survives_a_checkpoint_and_another_one_begins_with_it(tmp_path):
    from speechlearn.checkpoint import load_checkpoint, save_checkpoint
    from speechlearn.recipes import begin_with

    vocabulary = CharacterVocabulary(" ab")
    for head in ("ctc", "transducer"):
        torch.manual_seed(3)
        config = AlignmentRecogniserConfig(vocab=len(vocabulary), head=head, n_bins=80, d_model=32, n_heads=2, n_layers=1, d_feedforward=64, decoder_dim=32, joiner_dim=32)
        model = AlignmentRecogniser(config).eval()
        save_checkpoint(tmp_path / head, model, vocabulary=vocabulary, features={}, metadata={})
        again = load_checkpoint(tmp_path / head).model.eval()
        features, lengths = torch.randn(1, 30, 80), tensor([30])
        assert torch.equal(model(features, lengths)[0], again(features, lengths)[0]) and again.config == config
    torch.manual_seed(4)
    fresh = AlignmentRecogniser(config)
    copied = begin_with(fresh, str(tmp_path / "ctc"))
    ctc = load_checkpoint(tmp_path / "ctc").model
    assert copied == sum(p.numel() for p in fresh.encoder.parameters())
    assert all(torch.equal(a, b) for a, b in zip(fresh.encoder.parameters(), ctc.encoder.parameters()))
    with pytest.raises(ValueError, match="no weight of the checkpoint"):
        begin_with(torch.nn.Linear(2, 2), str(tmp_path / "ctc"))
