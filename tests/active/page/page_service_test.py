"""The next images, the honest error, and lists to review."""

import pages
import pytest

from ssljax import intervals
from ssljax.active.page import service
from ssljax.errors import InputError


@pytest.fixture
def page(tmp_path):
  made = pages.open_page(tmp_path, random_share=0.0)
  yield made
  made.store.close()


def names(items):
  return [item['file'] for item in items]


def give(page, who, labels, **more):
  page.answer(
    who, [{'file': f, 'label': y} | more for f, y in labels.items()], ''
  )


def predictions(scores):
  """Predictions of the first images: cat if the number is even."""
  return {
    f'{k:03d}.png': (('cat', 'dog')[k % 2], 0.5 + k / 100, score)
    for k, score in enumerate(scores)
  }


def test_the_highest_score_comes_first_and_answers_do_not_come_again(page):
  pages.publish(page, predictions([1, 5, 3, 4]))
  assert names(page.next('acquisition', 3, 'ada')) == [
    '001.png',
    '003.png',
    '002.png',
  ]
  give(page, 'ada', {'001.png': 'dog'})
  assert names(page.next('acquisition', 1, 'ada')) == ['003.png']


def test_two_annotators_are_not_shown_the_same_image(page):
  pages.publish(page, predictions([4, 3, 2, 1]))
  first = names(page.next('acquisition', 2, 'ada'))
  second = names(page.next('acquisition', 2, 'bob'))
  assert first == ['000.png', '001.png'] and second == ['002.png', '003.png']


def test_queues_by_uncertainty_and_class(page):
  pages.publish(page, predictions([0, 0, 0, 0]))
  assert names(page.next('uncertainty', 2, 'ada')) == ['000.png', '001.png']
  found = page.next('class', 2, 'ada', of='dog')
  assert names(found) == ['001.png', '003.png']
  grid = page.grid('cat', 'desc', 10, 'ada')
  assert names(grid) == ['002.png', '000.png']
  assert grid[0]['shown']['suggestion'] == 'cat'


def test_before_any_prediction_images_come_at_random(page):
  found = page.next('acquisition', 12, 'ada')
  assert sorted(names(found)) == [f'{k:03d}.png' for k in range(12)]
  assert names(found) != sorted(names(found))
  assert page.next('acquisition', 1, 'ada', {i['id'] for i in found}) == []


def test_random_images_are_uniform_and_shown_blind(tmp_path):
  page = pages.open_page(tmp_path, count=6)
  drawn = [
    item['file'] for _ in range(1200) for item in page.next('random', 1, 'ada')
  ]
  counts = [drawn.count(f'{k:03d}.png') for k in range(6)]
  # 200 each; four standard deviations are 52.
  assert all(abs(count - 200) < 52 for count in counts)
  (item,) = page.next('random', 1, 'ada')
  assert item['shown']['blind'] and item['shown']['queue'] == 'random'
  page.store.close()


def test_a_share_of_random_images_is_mixed_in(tmp_path):
  page = pages.open_page(tmp_path, count=12, random_share=0.25)
  pages.publish(page, predictions(range(12)))
  found = [page.next('acquisition', 1, 'ada')[0] for _ in range(800)]
  share = sum(i['shown']['queue'] == 'random' for i in found) / 800
  assert share == pytest.approx(0.25, abs=0.06)
  page.store.close()


def test_the_error_is_of_blind_random_answers_alone(page):
  pages.publish(page, predictions(range(12)))
  truth = {f'{k:03d}.png': 'cat' for k in range(12)}  # half are predicted dog
  for k, (file, label) in enumerate(truth.items()):
    shown = {'queue': 'random', 'blind': True, 'suggestion': 'dog'}
    if k < 4:  # not honest: seen with the suggestion, or by another queue
      shown = shown | {'blind': False}
    shown['suggestion'] = ('cat', 'dog')[k % 2]
    give(page, 'ada', {file: label}, shown=shown)
  error = page.progress()['error']
  assert error['images'] == 8 and error['error'] == 0.5
  low, high = intervals.wilson(4, 8)
  assert error['low'] == pytest.approx(low, abs=1e-6)
  assert error['high'] == pytest.approx(high, abs=1e-6)


def test_the_hint_comes_when_the_lower_bound_stops_moving():
  flat = [{'low': x} for x in (0.3, 0.101, 0.1, 0.11)]
  assert 'may not help' in service.stopping_hint(flat)
  assert service.stopping_hint(flat[:3]) == ''
  assert service.stopping_hint([]) == ''


def test_undone_images_come_back_and_are_no_longer_honest(page):
  pages.publish(page, predictions(range(12)))
  shown = {'queue': 'random', 'blind': True, 'suggestion': 'cat'}
  give(page, 'ada', {'001.png': 'cat'}, shown=shown)
  (item,) = page.undo('ada')
  assert item['file'] == '001.png' and item['was'] == 'cat'
  give(page, 'ada', {'001.png': 'dog'}, shown=item['shown'])
  assert page.progress()['error'] is None


def test_a_file_that_changed_since_it_was_shown_is_not_labelled(page):
  (item,) = page.next('random', 1, 'ada')
  (page.images.root / item['file']).write_bytes(b'another')
  page.images.scan()
  given = {'file': item['file'], 'stamp': item['stamp'], 'label': 'cat'}
  with pytest.raises(InputError, match='has changed since it was shown'):
    page.answer('ada', [given], '')


def test_labelled_files_that_change_or_vanish_are_listed(page):
  give(page, 'ada', {'001.png': 'cat', '002.png': 'cat', '003.png': 'cat'})
  (page.images.root / '001.png').write_bytes(b'another')
  (page.images.root / '002.png').unlink()
  page.images.scan()
  assert page.changed() == ['001.png', '002.png']
  assert page.progress()['labelled'] == 3  # the answers stay


def test_disagreements_are_of_models_that_did_not_see_the_label(page):
  give(page, 'ada', {'001.png': 'cat', '002.png': 'cat', '003.png': 'dog'})
  unseen = [('001.png', 'dog', 0.6), ('002.png', 'dog', 0.9)]
  unseen += [('003.png', 'dog', 0.99), ('004.png', 'cat', 0.99)]
  pages.publish(page, predictions(range(6)), unseen=unseen)
  found = page.disagreements()
  assert names(found) == ['002.png', '001.png']
  assert found[0]['given'] == 'cat'
  assert found[0]['shown']['suggestion'] == 'dog'
  give(page, 'ada', {'002.png': 'cat'}, final=True)  # somebody has looked
  assert names(page.disagreements()) == ['001.png']


def test_conflicts_name_the_annotators(page):
  give(page, 'ada', {'001.png': 'cat', '002.png': 'cat'})
  assert names(page.next('others', 5, 'bob')) == ['001.png', '002.png']
  give(page, 'bob', {'001.png': 'dog', '002.png': 'cat'})
  assert page.next('others', 5, 'bob') == []
  found = page.conflicts()
  assert names(found['files']) == ['001.png']
  assert found['files'][0]['answers'] == {'ada': 'cat', 'bob': 'dog'}
  assert found['agreement']['agreed'] == 0.5


def test_predictions_follow_a_renamed_class(page):
  pages.publish(page, predictions([2, 1]))
  page.store.rename_class('cat', 'tiger')
  (item,) = page.next('class', 1, 'ada', of='tiger')
  assert item['shown']['suggestion'] == 'tiger'
  assert names(page.grid('tiger', 'desc', 5, 'ada')) == ['000.png']


def test_the_map_has_predictions_and_labels(page):
  pages.publish(page, predictions([2, 1]))
  give(page, 'ada', {'001.png': 'cat'})
  points = {row[1]: row for row in page.points()}
  assert points['000.png'][4:6] == ['cat', None]
  assert points['001.png'][2:6] == [0.05, 0.5, 'dog', 'cat']


def test_damaged_predictions_are_ignored(page):
  (page.store.folder / 'suggestions.sqlite').write_bytes(b'x' * 5000)
  assert len(page.next('acquisition', 3, 'ada')) == 3
  assert page.progress()['round'] is None
