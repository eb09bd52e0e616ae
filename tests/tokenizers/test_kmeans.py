import pytest
import torch

from vlmoe_core.tokenizers import kmeans as module
from vlmoe_core.tokenizers.kmeans import kmeans, nearest_centroid


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("table", [1, 7 * 50, 2**20])
def test_nearest_equals_brute_force(monkeypatch: pytest.MonkeyPatch, table: int) -> None:
    monkeypatch.setattr(module, "LARGEST_TABLE", table)
    points = torch.randn(103, 5, generator=generator())
    centroids = torch.randn(7, 5, generator=generator(1))
    label, distance = nearest_centroid(points, centroids)
    for i, point in enumerate(points):
        each = [float((point - c).double().square().sum()) for c in centroids]
        assert label[i] == each.index(min(each))
        assert float(distance[i]) == pytest.approx(min(each), abs=1e-5)


def test_the_first_of_equal_centroids_is_taken() -> None:
    label, distance = nearest_centroid(torch.ones(4, 3), torch.ones(5, 3))
    assert label.tolist() == [0] * 4
    assert distance.tolist() == [0.0] * 4


def test_each_iteration_lowers_the_error() -> None:
    points = torch.randn(500, 3, generator=generator())
    errors = [float(nearest_centroid(points, kmeans(points, 20, n, generator()))[1].sum()) for n in range(8)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.8 * errors[0]


def test_it_stops_at_a_fixed_point() -> None:
    points = torch.randn(200, 2, generator=generator())
    found = kmeans(points, 6, 1000, generator())
    label, _ = nearest_centroid(points, found)
    for k in range(6):
        assert torch.allclose(found[k], points[label == k].mean(0), atol=1e-5)


def test_centroids_are_the_means_of_their_points() -> None:
    points = torch.tensor([[0.0], [1.0], [10.0], [12.0]])
    found = kmeans(points, 2, 20, generator(3)).sort(0).values
    assert found.flatten().tolist() == [0.5, 11.0]


def test_empty_centroids_are_revived() -> None:
    # Nine of ten points are alike, so most first centroids coincide and lose all their points.
    points = torch.cat([torch.zeros(900, 4), torch.randn(100, 4, generator=generator())])
    label, _ = nearest_centroid(points, kmeans(points, 50, 20, generator()))
    assert len(label.unique()) == 50


def test_fewer_distinct_points_than_centroids() -> None:
    points = torch.eye(3).repeat(10, 1)
    label, distance = nearest_centroid(points, kmeans(points, 8, 10, generator()))
    assert len(label.unique()) == 3
    assert float(distance.max()) == pytest.approx(0, abs=1e-6)
    assert torch.equal(kmeans(torch.zeros(9, 2), 4, 5, generator()), torch.zeros(4, 2))


def test_the_same_seed_gives_the_same_bits() -> None:
    points = torch.randn(2000, 16, generator=generator())
    assert torch.equal(kmeans(points, 64, 10, generator(1)), kmeans(points, 64, 10, generator(1)))
    assert not torch.equal(kmeans(points, 64, 10, generator(1)), kmeans(points, 64, 10, generator(2)))
