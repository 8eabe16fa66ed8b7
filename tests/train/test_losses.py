"""The two objectives against plain formulas."""

import math

import pytest
import torch
import torch.nn.functional as F

from visplice.lm.config import LlamaConfig
from visplice.lm.decoder import Llama
from visplice.lm.prompt import IGNORE
from visplice.train.losses import answer_loss, info_nce, retrieval


def test_info_nce_of_orthogonal_pairs_by_hand() -> None:
    # Cosine 1 with the own caption and 0 with the other: -log(e^s / (e^s + 1)) in both directions.
    image, text = torch.eye(2) * 3.0, torch.eye(2) * 0.1
    expected = -math.log(math.exp(2.0) / (math.exp(2.0) + 1))
    assert info_nce(image, text, torch.tensor(2.0)).item() == pytest.approx(expected, rel=1e-6)


def test_info_nce_is_symmetric_and_averages_both_directions() -> None:
    image, text, scale = torch.randn(5, 8), torch.randn(5, 8), torch.tensor(10.0)
    cosines = torch.stack([F.cosine_similarity(i[None], text) for i in image]) * scale
    rows = -cosines.log_softmax(1).diagonal().mean()
    columns = -cosines.log_softmax(0).diagonal().mean()
    assert info_nce(image, text, scale).item() == pytest.approx(((rows + columns) / 2).item(), rel=1e-5)
    assert info_nce(image, text, scale).item() == pytest.approx(info_nce(text, image, scale).item(), rel=1e-6)


def test_answer_loss_equals_the_loss_over_all_logits() -> None:
    config = LlamaConfig(vocab_size=50, dim=32, num_layers=2, num_heads=4, num_kv_heads=2, ffn_dim=48)
    model = Llama(config)
    ids, labels = torch.randint(0, 50, (3, 12)), torch.full((3, 12), IGNORE)
    labels[0, 5:7], labels[2, 11] = ids[0, 5:7], ids[2, 11]
    hidden = model.hidden(model.tok_embeddings(ids))
    logits = model(ids)
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE)
    loss, right = answer_loss(model, hidden, labels)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    wanted = [(logits[b, s - 1].argmax() == labels[b, s]).float() for b, s in ((0, 5), (0, 6), (2, 11))]
    assert right.item() == pytest.approx(torch.stack(wanted).mean().item())


def test_retrieval_counts_rows_whose_own_caption_is_among_the_nearest() -> None:
    text = torch.eye(4)
    image = torch.eye(4)[[0, 1, 2, 2]]  # the last picture is nearest to caption 2, its own comes later
    assert retrieval(image, text, 1) == 0.75
    assert retrieval(image, text, 4) == 1.0
