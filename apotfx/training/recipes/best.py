r"""For accuracy: six float networks teach, and the bits are lowered step by step.

Float networks are trained first, by the default recipe. Six of them, ResNet-18s and ResNet-10s, teach in turn (Hinton,
Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, https://arxiv.org/abs/1503.02531). A network of 5
or more bits starts from the float one of its kind and seed; at 4, 3 and 2 bits it goes on from 5, 4 and 3.

    python tools/table.py --recipes best --archs resnet10 --bits 32,5,4,3,2

trains all of them in this order. By hand, with one teacher, the steps to 4 bits are

    python tools/train.py --arch resnet18 --bit 32 --name teacher
    python tools/train.py --arch resnet10 --bit 32 --name float
    python tools/train.py --recipe best --arch resnet10 --bit 5 --name five --pretrained runs/float \
        --teacher runs/teacher
    python tools/train.py --recipe best --arch resnet10 --bit 4 --name four --pretrained runs/five \
        --teacher runs/teacher

On MNIST, mean and standard deviation of three seeds, on test images, after the last epoch: ResNet-18 APoT 99.51 ± 0.04
at 5 bits, 99.50 ± 0.02 at 4, 99.50 ± 0.04 at 3 and 99.38 ± 0.05 at 2; uniform 99.53 ± 0.05, 99.55 ± 0.01, 99.47 ± 0.03
and 99.35 ± 0.05; ResNet-10 APoT 99.56 ± 0.04, 99.53 ± 0.03, 99.54 ± 0.04 and 99.36 ± 0.09, uniform 99.56 ± 0.04,
99.55 ± 0.01, 99.50 ± 0.02 and 99.31 ± 0.05. One core of an AMD EPYC with AVX512-VNNI takes 7 to 9 minutes for a
ResNet-18, 4 to 6 for a ResNet-10, and 4 to 8 for a teacher. The README says what each part of the recipe is worth.
"""

START = "default"  # the recipe of the float networks that teach, and that others start from
TEACHERS = tuple((arch, seed) for arch in ("resnet18", "resnet10") for seed in (0, 1, 2))
LOWERING = (5, 4, 3, 2)  # bits, each trained from the one before

SETTINGS = {"epochs": 20, "teacher_weight": 1.0}
