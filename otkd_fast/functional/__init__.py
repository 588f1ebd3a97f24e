"""Public functions: argument checks, dtype policy, and autograd.Functions over the compiled ops."""
