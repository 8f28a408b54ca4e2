def what_onednn_lacks(imodel):
    return "not written yet"


def fuse(imodel):
    return imodel
