"""Text around the model: tokens to text, chat templates, grammars that an answer keeps."""
