"""What becomes of a score, written as a Python function: `score_mod`, `mask_mod`, and the softcap and ALiBi.

capture.py takes a function apart, by walk.py: its structure, for which a kernel is compiled, and what it
captures, which a call passes along. numbers.py has the numbers that it computes with, each with its
derivative; they wrap PyTorch's tensors on the CPU (torch_numbers.py) and a kernel's registers
(kernels/parts/numbers.py).
"""
