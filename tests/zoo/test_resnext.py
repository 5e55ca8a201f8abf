from torch import nn

from metaprune.zoo import build


def test_cardinality_and_depth():
    model = build("cifar_resnext29")
    grouped = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    assert len(grouped) == 9
    assert {m.groups for m in grouped} == {8}
    main = [m for name, m in model.named_modules() if isinstance(m, nn.Conv2d) and "downsample" not in name]
    assert len(main) + 1 == 29
