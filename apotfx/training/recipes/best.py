"""draft"""

LOWERING = (5, 4, 3, 2)
TEACHERS = (("resnet18", 0), ("resnet18", 1), ("resnet18", 2))
SETTINGS = {"augment": "strong"}
