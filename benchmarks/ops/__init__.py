"""Operations one by one, against the rules they replace and against others' kernels."""
