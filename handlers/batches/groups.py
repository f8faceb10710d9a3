"""Batches of groups, each with all of its members."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np

from .minibatch import Capacity, Minibatch, as_leaf, as_rows, batch_of, integer_type


class RaggedGroups:
    """Groups with different numbers of members, from which batches are cut.

    Subjects have visits, students ratings, cells reads: a batch holds some groups, each
    with all of its members. This object is made once, from a long table. Called with a
    list of groups, it makes their ``Minibatch``, so it can be the ``collate_fn`` of a
    loader of torch, or be mapped over batches of grain. It can be pickled.

    Parameters
    ----------
    group : array of shape (members,)
        The group of each member, in any order. Whole numbers are rows of the groups'
        plate, from 0. Strings and dates are labels; rows follow their order.
    plates : tuple of two str
        The names of the model's plates, of the groups and of the members.
    members : dict of str to array
        Arguments of the model with a row for each member, shapes ``(members, ...)``.
    groups : dict of str to array, optional
        Arguments of the model with a row for each group, shapes ``(size, ...)``.
    position : str, default "group"
        The argument of the model that is, for each member, the position of its group
        among the groups of the batch.
    count : str, default "count"
        The argument of the model that is the number of groups in the batch, without
        padding. The model scales its members by ``size / count``.
    rows : str, optional
        The argument of the model that is the rows of the groups in the batch, if it has
        one.
    labels : array of shape (size,), optional
        The label of each group, in the order of `groups`. Then `group` holds such
        labels, numbers too.
    size : int, optional
        The number of groups, where it is more than `group` tells, because the last
        groups, or others, have no member.

    Attributes
    ----------
    size : int
        The number of groups.
    counts : array of shape (size,)
        The number of members of each group.
    members, groups : dict of str to numpy.ndarray
        The arrays, in the order in which they were given.
    labels : array of shape (size,) or None
        The label of each group. None if `group` holds rows.

    Raises
    ------
    ValueError
        If `group` is no vector, or holds what is neither a row nor a label; if arrays
        differ in length or are not of numbers; if a group has no member, and neither
        `size` nor `labels` nor `groups` say that it exists; if two arguments of the
        model have one name.

    Notes
    -----
    Whatever NumPy takes as an array is one, a column of pandas too. Arrays are neither
    copied nor sorted, so that they may be memory maps.

    Examples
    --------
    >>> student = np.random.default_rng(0).integers(50, size=300)  # of each rating
    >>> y = np.random.default_rng(1).normal(size=300).astype("float32")
    >>> ratings = RaggedGroups(
    ...     student,
    ...     plates=("students", "ratings"),
    ...     members={"y": y},
    ...     groups={"age": np.linspace(18, 30, 50, dtype="float32")},
    ...     position="student",
    ...     count="students",
    ... )
    >>> def model(age, students, student, y):
    ...     b = numpyro.sample("b", dist.Normal(0, 1))
    ...     with numpyro.plate("students", ratings.size, subsample_size=len(age)):
    ...         a = numpyro.sample("a", dist.Normal(b * age, 1))
    ...     # Ratings count as their students do: the data of all stand for these.
    ...     scaled = handlers.scale(scale=ratings.size / students)
    ...     with scaled, numpyro.plate("ratings", len(y)):
    ...         numpyro.sample("y", dist.Normal(a[student], 1), obs=y)
    >>> load = partial(ratings, capacity=ratings.capacity(16))
    >>> def batches(epoch):
    ...     order = np.random.default_rng(epoch).permutation(ratings.size)
    ...     return map(load, np.split(order, range(16, ratings.size, 16)))
    >>> svi = SubsampleSVI(model, AutoNormal(model), optax.adam(0.05), Trace_ELBO())
    >>> svi.fit(key, batches, epochs=2, progress_bar=False).compilations
    1
    """

    def __init__(
        self,
        group: Any,
        *,
        plates: tuple[str, str],
        members: Mapping[str, Any],
        groups: Mapping[str, Any] | None = None,
        position: str = "group",
        count: str = "count",
        rows: str | None = None,
        labels: Any = None,
        size: int | None = None,
    ) -> None:
        self._plates, self._names = plates, (position, count, rows)
        self.members = _columns("members", members)
        self.groups = _columns("groups", groups or {})
        names = [*self.members, *self.groups, position, count, rows]
        if twice := sorted({n for n in names if n is not None and names.count(n) > 1}):
            raise ValueError(f"Several arguments of the model are called {twice}.")
        if isinstance(group, np.ma.MaskedArray):
            raise ValueError("group is a masked array. Leave out what is masked.")
        own, self.labels = _rows_and_labels(np.asarray(group), labels)
        for name, column in self.members.items():
            if len(column) != len(own):
                raise ValueError(
                    f"group has {len(own)} members, but members[{name!r}] has "
                    f"{len(column)}."
                )
        self.size = self._size(own, size)
        self.counts = np.bincount(own, minlength=self.size)
        self._starts = np.cumsum(self.counts) - self.counts
        self._order = np.argsort(own, kind="stable")

    def __call__(
        self,
        rows: Any,
        /,
        *,
        capacity: Capacity | Mapping[str, Capacity] | None = None,
        **others: Any,
    ) -> Minibatch:
        """Make the batch of some groups, with all of their members.

        Parameters
        ----------
        rows : array of shape (groups,)
            The rows of the groups. A group that is named twice has its members twice.
        capacity : int, "powers of two", or dict of str to these, optional
            To which size to pad, for groups and members alike or for each plate by
            name: the next multiple of a number, or the next power of two. The groups
            are never padded beyond `size`. Without a capacity, each batch of another
            size is compiled for; the method ``capacity`` gives one that fits all.
        **others
            What else the model is called with, which must not run along a plate:
            numbers and flags.

        Returns
        -------
        Minibatch
            It calls the model with keywords.

        Raises
        ------
        ValueError
            If rows are no vector of whole numbers, or none of the groups'; if these
            have no member at all; if a capacity is none.

        Examples
        --------
        >>> visits = RaggedGroups(
        ...     ["a", "b", "a", "c"],
        ...     plates=("subjects", "visits"),
        ...     members={"y": [1.0, 2.0, 3.0, 4.0]},
        ... )
        >>> batch = visits([2, 0])
        >>> batch.kwargs["y"].tolist(), batch.kwargs["group"].tolist()
        ([4.0, 1.0, 3.0], [0, 1, 1])
        """
        of_groups, of_members = self._plates
        position, count, own_rows = self._names
        if np.asarray(rows).dtype.kind in "USO":
            raise ValueError(
                f"The rows of plate '{of_groups}' are whole numbers, not labels. Where "
                "there are labels: np.searchsorted(groups.labels, names), if sorted."
            )
        rows = np.asarray(as_rows(of_groups, rows, self.size))
        counts = self.counts[rows]
        ends = counts.cumsum()
        # The members of a group lie one after another in the order of groups.
        places = np.repeat(self._starts[rows] - ends + counts, counts)
        places = self._order[places + np.arange(len(places))]
        arguments = {
            **{name: column[rows] for name, column in self.groups.items()},
            count: len(rows),
            position: np.arange(len(rows), dtype=integer_type()).repeat(counts),
            **{name: column[places] for name, column in self.members.items()},
        }
        if own_rows is not None:
            arguments[own_rows] = rows
        if twice := sorted(others.keys() & arguments.keys()):
            raise ValueError(f"{twice} are arguments that the groups bring along.")
        return batch_of(
            (),
            arguments | others,
            {of_groups: rows},
            {of_members: (position, *self.members)},
            capacity,
            {of_groups: self.size},
        )

    def capacity(self, batches: int | Iterable[Any]) -> dict[str, int]:
        """Return a capacity of groups and members, for one compilation.

        Parameters
        ----------
        batches : int, or iterable of arrays
            The number of groups in a batch; then no batch of different groups can have
            more members than the capacity, which is the sum of the largest groups. Or
            the batches to come, the rows of each, in all epochs; then it is the sum of
            the largest batch, which is less.

        Returns
        -------
        dict of str to int
            By plate, for the `capacity` of a call.

        Raises
        ------
        ValueError
            If `batches` is a number below 1, or holds no batch.

        Examples
        --------
        >>> visits = RaggedGroups(
        ...     ["a", "b", "a", "c"], plates=("subjects", "visits"), members={}
        ... )
        >>> visits.capacity(2)
        {'subjects': 2, 'visits': 3}
        >>> visits.capacity([[1, 2], [0]])
        {'subjects': 2, 'visits': 2}
        """
        if isinstance(batches, int | np.integer):
            if batches < 1:
                raise ValueError(f"A batch holds at least 1 group, not {batches}.")
            largest = np.sort(self.counts)[::-1][:batches]
            sizes = [(len(largest), int(largest.sum()))]
        else:
            sizes = [(len(own), int(self.counts[own].sum())) for own in batches]
            if not sizes:
                raise ValueError("There is no batch to make room for.")
        return dict(zip(self._plates, map(max, zip(*sizes, strict=True)), strict=True))

    def _size(self, own: np.ndarray, size: int | None) -> int:
        """Return the number of groups, on which all that tells it agrees."""
        told = {f"groups[{name!r}]": len(c) for name, c in self.groups.items()}
        if self.labels is not None:
            told["labels"] = len(self.labels)
        if size is not None:
            told["size"] = size
        if len(set(told.values())) > 1:
            raise ValueError(f"The number of groups is not one, but {told}.")
        low, high = int(own.min()), int(own.max())
        size = next(iter(told.values()), high + 1)
        if low < 0 or high >= size:
            raise ValueError(
                f"group runs from {low} to {high}, outside 0 to {size - 1}. Leave out "
                "members without a group; where the numbers are labels, give labels=, "
                "such as np.unique(group)."
            )
        # Labels may be too large to be counted.
        if not told and (size > len(own) or not np.bincount(own).all()):
            raise ValueError(
                f"group runs from {low} to {high}, but some of these groups have no "
                f"member. If they exist, give size={size} or more; if the numbers are "
                "labels, give labels=, such as np.unique(group)."
            )
        return size


def _columns(what: str, given: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Take the arrays of members or groups to the host."""
    columns = {}
    for name, column in given.items():
        label = partial(str, f"{what}[{name!r}]")
        columns[name] = np.asarray(as_leaf(column, label))
        if columns[name].ndim < 1:
            raise ValueError(f"{label()} is no array with a row for each of them.")
    return columns


def _rows_and_labels(
    group: np.ndarray, labels: Any
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the row of each member's group, and the labels of the rows."""
    if group.ndim != 1 or not len(group):
        raise ValueError(
            f"group must be a vector with the group of each member, but has shape "
            f"{group.shape}."
        )
    if group.dtype == object:  # what pandas has
        kinds = {type(label) for label in group.tolist()}
        if kinds not in ({str}, {int}):
            names = sorted(kind.__name__ for kind in kinds)
            raise ValueError(
                f"group holds {names}, but must hold whole numbers or strings only. "
                "Leave out members without a group."
            )
        group = np.array(group.tolist())
    if labels is not None:
        labels = np.asarray(labels)
        order = np.argsort(labels, kind="stable")
        known = labels[order]
        if (known[1:] == known[:-1]).any():
            raise ValueError("labels must name each group once.")
        places = np.minimum(np.searchsorted(known, group), len(known) - 1)
        if (unknown := known[places] != group).any():
            label = group[unknown.argmax()]
            raise ValueError(f"group holds {label!r}, which is none of labels.")
        return order[places], labels
    if group.dtype.kind in "iu":
        return group.astype(np.int64), None
    if group.dtype.kind not in "USM":
        raise ValueError(
            f"group is of type {group.dtype}, but must hold whole numbers or strings. "
            "Give group.astype(int), or labels=, such as np.unique(group)."
        )
    labels, rows = np.unique(group, return_inverse=True)
    return rows, labels
