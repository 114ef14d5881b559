"""From image files to device tensors: manifest → plan → DALI graph → loader."""
