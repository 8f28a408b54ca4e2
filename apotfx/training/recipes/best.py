r"""For accuracy: three float networks teach, and the bits are lowered step by step. A draft: not measured yet.

Float networks are trained first, by the default recipe. Three of them, ResNet-18s, teach in turn (Hinton, Vinyals,
Dean, "Distilling the Knowledge in a Neural Network", 2015, https://arxiv.org/abs/1503.02531). A network of 4 or more
bits starts from the float one of its kind and seed; at 3 and 2 bits it goes on from 4 and 3.

    python tools/table.py --recipes best --archs resnet10 --bits 32,5,4,3,2

trains all of them in this order. By hand, with one teacher, the steps to 3 bits are

    python tools/train.py --arch resnet18 --bit 32 --name teacher
    python tools/train.py --arch resnet10 --bit 32 --name float
    python tools/train.py --recipe best --arch resnet10 --bit 4 --name four --pretrained runs/float \
        --teacher runs/teacher
    python tools/train.py --recipe best --arch resnet10 --bit 3 --name three --pretrained runs/four \
        --teacher runs/teacher
"""

START = "default"  # the recipe of the float networks that teach, and that others start from
TEACHERS = (("resnet18", 0), ("resnet18", 1), ("resnet18", 2))  # network and seed
LOWERING = (4, 3, 2)  # bits, each trained from the one before

SETTINGS = {"epochs": 20, "teacher_weight": 1.0}
