from model_fixtures import text_file, tiny_encoder, tiny_model  # noqa: F401 - fixtures
