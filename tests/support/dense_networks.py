"""The judge of top-k networks: the model's own code, whose last layers read zero for the neurons that are not kept."""

import torch


def keep_best_neurons(model, k, linear_out, linear_in=""):
    """Have the last layer of each network read zero for all neurons but the k best of each token.

    Returns how many networks these are.

    linear_out  how the paths of the last layers end
    linear_in   the same of the first ones, by whose output neurons are ranked; "" ranks by the size of what they give
    """
    modules, num_networks = dict(model.named_modules()), 0
    for path, module in modules.items():
        if path.endswith(f".{linear_out}"):
            first = modules.get(path.removesuffix(linear_out) + linear_in)
            if first is not None or not linear_in:  # BERT's attention has a layer of this name too
                _keep_best(module, k, first if linear_in else None)
                num_networks += 1
    return num_networks


def _keep_best(last, k, first):
    before = []
    if first is not None:
        first.register_forward_hook(lambda module, args, output: before.append(output))

    def zero_others(module, args):
        ranked_by = before.pop() if first is not None else args[0].abs()
        kept = ranked_by.topk(k, dim=-1).indices
        return (torch.zeros_like(args[0]).scatter(-1, kept, args[0].gather(-1, kept)), *args[1:])

    last.register_forward_pre_hook(zero_others)
