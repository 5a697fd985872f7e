def plot(out, result):
    pass
