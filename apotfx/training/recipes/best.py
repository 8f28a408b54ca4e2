r"""For accuracy: float teachers, and bits that are lowered step by step. A draft: no figure was measured with it yet.

Float networks are trained first, for longer. Three of them, ResNet-18s, teach together (Hinton, Vinyals, Dean,
"Distilling the Knowledge in a Neural Network", 2015, https://arxiv.org/abs/1503.02531). A quantized network starts from
the float one of its kind and seed at 5 bits, then goes on at 4, 3 and 2 bits, each from the weights before.

    python tools/table.py --recipes best --archs resnet10 --bits 32,5,4,3,2

trains all of them in this order. By hand, the first steps are

    python tools/train.py --recipe best --arch resnet18 --bit 32 --name teacher
    python tools/train.py --recipe best --arch resnet10 --bit 32 --name float
    python tools/train.py --recipe best --arch resnet10 --bit 5 --name five --pretrained runs/float/best.pt \
        --teacher runs/teacher/best.pt
    python tools/train.py --recipe best --arch resnet10 --bit 4 --name four --pretrained runs/five/best.pt \
        --teacher runs/teacher/best.pt
"""

LOWERING = (5, 4, 3, 2)  # bits, each trained from the one before
TEACHERS = (("resnet18", 0), ("resnet18", 1), ("resnet18", 2))  # network and seed

SETTINGS = {"epochs": 25}
FLOAT_SETTINGS = {"epochs": 40}
