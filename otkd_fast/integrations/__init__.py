"""The losses inside other training frameworks; none of them is imported before its module here is."""
