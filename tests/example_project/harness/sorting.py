"""The program under test: a merge sort of integers."""


def merge(left: list[int], right: list[int]) -> list[int]:
    """Merge two sorted lists."""
    merged: list[int] = []
    i = j = 0
    while i < len(left) and j < len(right):
        if right[j] < left[i]:
            merged.append(right[j])
            j += 1
        else:
            merged.append(left[i])
            i += 1
    return merged + left[i:] + right[j:]


def sort(numbers: list[int]) -> list[int]:
    """Return the numbers in ascending order."""
    if len(numbers) < 2:
        return numbers
    middle = len(numbers) // 2
    return merge(sort(numbers[:middle]), sort(numbers[middle:]))
