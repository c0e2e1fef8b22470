"""Scores of given tokens against decoding them one by one."""

import jax
import numpy as np

import fastkv_jax as fk
from examples import EXAMPLES, model_a
from fastkv_jax.prefilling.likelihood import next_token_scores
from tolerances import SAME

random = np.random.default_rng(0)
DOCUMENTS = [random.integers(0, 128, n) for n in (150, 61)]
TEXTS = [random.integers(0, 128, n) for n in (9, 5)]


def test_scores_equal_those_of_decoding_step_by_step():
    for method in (fk.FullKV(), EXAMPLES["fastkv"][0], EXAMPLES["adakv"][0]):
        cache = fk.prefill(model_a(), *fk.pad_batch(DOCUMENTS), method=method, max_new_tokens=0).cache
        tokens, start = fk.pad_batch(TEXTS)
        found, best = (np.asarray(a) for a in next_token_scores(model_a(), tokens, start, cache=cache))
        for row, text in enumerate(TEXTS):
            one = [DOCUMENTS[row]]
            stepped = fk.prefill(model_a(), *fk.pad_batch(one, 192), method=method, max_new_tokens=10).cache
            expected, greedy = [], []
            for token, following in zip(text, text[1:], strict=False):
                logits, stepped = fk.decode_step(model_a(), [token], stepped)
                expected.append(float(jax.nn.log_softmax(logits[0])[following]))
                greedy.append(int(np.argmax(logits[0])))
            np.testing.assert_allclose(found[row, -len(text) + 1 :], expected, rtol=0, atol=SAME)
            assert best[row, -len(text) + 1 :].tolist() == greedy
            assert (found[row, : start[row] + 1] == 0).all() and (best[row, : start[row] + 1] == -1).all()
