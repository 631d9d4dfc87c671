"""The harness's own windows, on documents small enough to write down."""

import numpy as np

from q4kd.harness.oracles.windows import MASKED, Document, Packing, chosen_windows, cut_windows

DOCUMENTS = [Document((1, 2, 3), (False, True, True)), Document((4, 5, 6, 7), (False, False, True, True))]


def _rows(packing: Packing) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
    found = cut_windows(DOCUMENTS, 3, packing)
    return found.ids.tolist(), found.labels.tolist(), found.documents.tolist()


def test_packed_documents_neither_see_nor_predict_each_other() -> None:
    assert _rows("documents") == (
        [[1, 2, 3], [4, 5, 6]],
        [[2, 3, MASKED], [MASKED, 6, 7]],
        [[0, 0, 0], [1, 1, 1]],
    )


def test_a_stream_is_one_document() -> None:
    learnt = [Document(document.ids, (True,) * len(document.ids)) for document in DOCUMENTS]
    found = cut_windows(learnt, 3, "stream")
    assert found.labels.tolist() == [[2, 3, 4], [5, 6, 7]]
    assert not found.documents.any()


def test_without_packing_each_document_is_cut_and_padded() -> None:
    ids, labels, _ = _rows("none")
    assert ids == [[1, 2, 0], [4, 5, 6]]
    assert labels == [[2, 3, MASKED], [MASKED, 6, 7]]


def test_each_epoch_takes_every_window_in_an_order_of_its_own() -> None:
    epochs = [np.concatenate([chosen_windows(8, 2, 3, 4 * epoch + step) for step in range(4)]) for epoch in range(2)]
    assert all(sorted(epoch.tolist()) == list(range(8)) for epoch in epochs)
    assert epochs[0].tolist() != epochs[1].tolist()
    assert chosen_windows(8, 2, 4, 0).tolist() != epochs[0][:2].tolist()
