"""Low-rank adapters: `peft` reads PEFT's folders, `store` keeps the loaded ones and gives them slots."""
