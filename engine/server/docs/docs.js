// An answer that a request without a seed gets here can be asked for again with the seed that it names.
SwaggerUIBundle({
  url: 'openapi.json',
  dom_id: '#api',
  deepLinking: true,
  // the badge of a validator would be loaded from another site
  validatorUrl: null,
  syntaxHighlight: false,
});
