import time

import torch
import torch.nn.functional as F

from metaprune.data import load
from metaprune.zoo import build


def test_trains_in_seconds():
    data, model, epochs = load("digits"), build("digits_cnn"), 20
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * 20)
    begin = time.perf_counter()
    for _ in range(epochs):
        for images, labels in data.train.batches(64, shuffle=generator, augment=True):
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            schedule.step()
    assert time.perf_counter() - begin < 60  # 2.5 s on a quiet core
    model.eval()
    with torch.no_grad():
        right = model(data.test.images()).argmax(1) == data.test.labels
    assert right.float().mean() > 0.97
