r"""For accuracy: three float networks teach, and the bits are lowered step by step.

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

On MNIST, mean and standard deviation of three seeds, on test images, after the last epoch: ResNet-10 APoT 99.51 ± 0.04
at 5 bits, 99.52 ± 0.01 at 4, 99.49 ± 0.02 at 3 and 99.38 ± 0.04 at 2; uniform 99.53 ± 0.06, 99.51 ± 0.01, 99.48 ± 0.02
and 99.31 ± 0.05. One core of an AMD EPYC with AVX512-VNNI takes 3 minutes for each, 4 for a teacher and 2.5 for the
float network. Not measured for ResNet-18.
"""

START = "default"  # the recipe of the float networks that teach, and that others start from
TEACHERS = (("resnet18", 0), ("resnet18", 1), ("resnet18", 2))  # network and seed
LOWERING = (4, 3, 2)  # bits, each trained from the one before

SETTINGS = {"epochs": 20, "teacher_weight": 1.0}
