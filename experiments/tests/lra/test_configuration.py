import re
from dataclasses import replace

import pytest

from topk_experiments.lra.configuration import METHOD_OPTIONS, TrainingConfig, read_config, shipped_configs
from topk_experiments.lra.tasks import ListOps
from topk_experiments.lra.training import new_model
from topk_experiments.rivals.names import METHODS

PUBLISHED = {"listops", "text", "retrieval", "image", "pathfinder32", "pathfinder128"}
SMALL = {"listops-small", "text-small", "image-small", "pathfinder-small", "same-document-small"}


def test_published_and_small_configurations_come_with_the_library():
    assert set(shipped_configs()) == PUBLISHED | SMALL


@pytest.mark.parametrize("name", sorted(PUBLISHED | SMALL))
def test_every_configuration_has_a_task_that_takes_its_settings(name):
    config = read_config(name)
    task = config.new_task("somewhere" if config.needs_source else None)
    assert config.name == name
    assert task.num_classes > 1
    for method in METHOD_OPTIONS:
        assert set(replace(config, sigma=2.0).attention_options(method)) == set(METHOD_OPTIONS[method])


def test_listops_is_published_with_its_generators_defaults():
    assert read_config("listops").new_task(None) == ListOps()


@pytest.mark.parametrize("name", sorted(SMALL))
def test_small_configurations_have_512_to_2048_tokens(name):
    config = read_config(name)
    task = config.new_task("somewhere" if config.needs_source else None)
    assert 512 <= task.max_length + (config.model.pooling == "cls") <= 2048


def test_the_published_schedule_rises_and_falls_with_the_square_root():
    training = read_config("listops").training
    assert training.learning_rate_at(500) == pytest.approx(0.05 * 0.5 / 1000**0.5)
    assert training.learning_rate_at(1000) == pytest.approx(0.05 / 1000**0.5)
    assert training.learning_rate_at(4000) == pytest.approx(0.05 / 4000**0.5)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (
            'task = "listops"',
            'task = "chess"',
            "task of configuration tiny must be one of listops, .* got 'chess'",
        ),
        ("min_length = 8", "shortest = 8", "data of configuration tiny must have num_train, .* shortest"),
        ("min_length = 8", "min_length = 80", "min_length must be at least 4 .* got 80 and 24"),
        ("num_heads = 2", "heads = 2", "model of configuration tiny must have num_layers, .* heads"),
        ("num_heads = 2", "", "model of configuration tiny must have num_heads"),
        ("num_heads = 2", "num_heads = 3", "d_attention must be a multiple of its 3 heads, got 16"),
        ("dropout = 0.0", "dropout = 1.0", "dropout must be at least 0 and below 1, got 1.0"),
        ("num_layers = 2", 'num_layers = 2\npooling = "max"', "pooling must be one of cls, mean, got 'max'"),
        ("num_layers = 2", 'num_layers = 2\npositions = "none"', "positions must be one of learned, .* got 'none'"),
        ("d_ff = 24", "d_ff = 0", "d_ff must be at least 1, got 0"),
        ("batch = 8", "batch = 0", "batch must be at least 1, got 0"),
        ("weight_decay = 0.01", "weight_decay = -1", "weight_decay must be at least 0, got -1"),
        ("batch = 8", "batch = 8\nalike_over = -1", "alike_over must be at least 0, got -1"),
        ("learning_rate = 0.003", "learning_rate = 0.0", "learning_rate must be above 0, got 0.0"),
        ("warmup = 2", 'warmup = 2\nschedule = "flat"', "schedule must be one of cosine, .* got 'flat'"),
        ("warmup = 2", 'warmup = 2\nprecision = "fp8"', "precision must be one of no, bf16, got 'fp8'"),
        ("k = 4", "", "attention of configuration tiny must have k, num_features and may have sigma, got num_f"),
        (
            "k = 4",
            "k = 4\nsigmas = 2.0",
            "attention of configuration tiny must have k, num_features and may have sigma, got k",
        ),
        ("k = 4", "k = 4\nsigma = 0.0", "sigma of configuration tiny must be a number above 0, got 0.0"),
        ("[attention]", "[attentions]", "configuration tiny must have the sections data, model, training, attention"),
        ("[attention]", "[attention", "configuration .*tiny.toml is not TOML"),
    ],
)
def test_a_setting_that_does_not_fit_is_named(tiny_file, old, new, words):
    text = tiny_file.read_text()
    assert old in text
    tiny_file.write_text(re.sub(rf"(?m)^{re.escape(old)}", new, text))
    with pytest.raises(ValueError, match=words):
        read_config(str(tiny_file)).new_task(None)


def test_a_configuration_that_is_nowhere_is_refused_with_those_that_are_there():
    with pytest.raises(FileNotFoundError, match=r"there is no configuration 'chess': neither a file nor one of image"):
        read_config("chess")


def test_a_source_is_asked_for_exactly_where_files_are_read(tiny):
    with pytest.raises(ValueError, match=r"text reads files: give --source; the folder of the full data set"):
        read_config("text").new_task(None)
    with pytest.raises(ValueError, match="tiny makes its own data; leave out --source"):
        tiny.new_task("folder")


def test_a_method_that_does_not_exist_is_refused(tiny):
    with pytest.raises(ValueError, match=r"method must be one of vanilla, query-chunks, .* got 'magic'"):
        tiny.attention_options("magic")


def test_a_setting_that_older_records_lack_is_left_out_where_it_changes_nothing(tiny):
    assert "alike_over" not in tiny.as_record()["training"]
    alike = replace(tiny, training=replace(tiny.training, alike_over=4))
    assert alike.as_record()["training"] == tiny.as_record()["training"] | {"alike_over": 4}


def test_cosine_ends_at_zero_whatever_the_warm_up():
    training = TrainingConfig(batch=1, steps=50, learning_rate=2.0, warmup=50, evaluate_every=1)
    assert training.learning_rate_at(50) == 2.0
    assert TrainingConfig(batch=1, steps=60, learning_rate=2.0, warmup=50, evaluate_every=1).learning_rate_at(60) == 0.0


def test_sigma_is_an_option_of_rfa_alone_and_named_where_it_is_not_as_usual(tiny, tiny_file):
    assert tiny.attention_options("rfa") == {"num_features": 16}
    tiny_file.write_text(tiny_file.read_text() + "sigma = 3.0\n")
    sharper = read_config(str(tiny_file))
    assert sharper.attention_options("rfa") == {"num_features": 16, "sigma": 3.0}
    assert sharper.attention_options("performer") == {"num_features": 16}
    model = new_model(sharper, sharper.new_task(None), "rfa", 0)
    sigmas = [value for name, value in model.named_parameters() if name.endswith("attention.sigma")]
    assert len(sigmas) == 2
    assert all((sigma == 3.0).all() for sigma in sigmas)


def test_every_method_is_in_the_one_table_of_methods():
    assert set(METHOD_OPTIONS) <= set(METHODS)
