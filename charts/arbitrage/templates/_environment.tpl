{{/* What a component's program is told. Takes root, c and components. */}}

{{- define "arbitrage.environment" -}}
{{- $root := .root -}}
{{- $c := .c -}}
- { name: HOME, value: /tmp }
- { name: ARBITRAGE_HOST, value: "0.0.0.0" }
- { name: ARBITRAGE_PORT, value: {{ $c.service.port | quote }} }
- { name: ARBITRAGE_METRICS_PORT, value: {{ $c.service.metricsPort | quote }} }
- { name: ARBITRAGE_SHUTDOWN_GRACE_S, value: {{ $c.drain.graceSeconds | quote }} }
- { name: ARBITRAGE_LOG_LEVEL, value: {{ $root.Values.logLevel }} }
- { name: ARBITRAGE_LOG_FORMAT, value: {{ $root.Values.logFormat }} }
{{- with $root.Values.tracing }}
{{- if .endpoint }}
- { name: ARBITRAGE_TRACING_ENDPOINT, value: {{ .endpoint | quote }} }
- { name: ARBITRAGE_TRACING_SAMPLE_RATE, value: {{ .sampleRate | quote }} }
{{- end }}
{{- end }}
{{- if $root.Values.tls.enabled }}
- { name: ARBITRAGE_TLS_CERTIFICATE, value: /etc/arbitrage/tls/tls.crt }
- { name: ARBITRAGE_TLS_KEY, value: /etc/arbitrage/tls/tls.key }
{{- end }}
{{- if $c.isModel }}
{{- include "arbitrage.modelEnvironment" . }}
{{- else if $c.isHttp }}
{{- include "arbitrage.gatewayEnvironment" . }}
{{- else }}
{{- include "arbitrage.orchestratorEnvironment" . }}
{{- end }}
{{- range $name, $value := $c.settings }}
- { name: {{ printf "ARBITRAGE_%s" $name }}, value: {{ ternary $value (toJson $value) (kindIs "string" $value) | quote }} }
{{- end }}
{{- with $c.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "arbitrage.modelEnvironment" -}}
{{- $c := .c -}}
{{- $isServed := ne $c.engine.mode "inProcess" }}
{{- if has $c.name (list "draft" "target") }}
- { name: ARBITRAGE_ROLE, value: {{ $c.name }} }
{{- end }}
{{- if and .root.Values.tls.enabled .root.Values.tls.mutual }}
- { name: ARBITRAGE_TLS_CLIENT_CA, value: /etc/arbitrage/tls/ca.crt }
- { name: ARBITRAGE_ALLOWED_CALLERS, value: {{ include "arbitrage.callers" . | quote }} }
{{- end }}
- { name: ARBITRAGE_MODEL, value: {{ ternary (regexReplaceAll "@.*$" $c.model.reference "") $c.model.reference $isServed | quote }} }
{{- with $c.model.id }}
- { name: ARBITRAGE_MODEL_ID, value: {{ . | quote }} }
{{- end }}
{{- if and $isServed (has $c.name (list "prm" "router")) }}
{{- include "arbitrage.scorerEnvironment" . }}
{{- else if $isServed }}
{{- include "arbitrage.engineEnvironment" . }}
{{- else }}
{{- if and (gt (int $c.gpu.count) 0) (not (hasKey $c.settings "DEVICE")) }}
- { name: ARBITRAGE_DEVICE, value: cuda }
{{- end }}
{{- with $c.model.dtype }}
- { name: ARBITRAGE_DTYPE, value: {{ . }} }
{{- end }}
{{- if ne $c.engine.prompt "plain" }}
- { name: ARBITRAGE_ENGINE_PROMPT, value: {{ $c.engine.prompt }} }
{{- end }}
{{- end }}
{{- with int $c.service.kservePort }}
- { name: ARBITRAGE_KSERVE_HTTP_PORT, value: {{ . | quote }} }
{{- end }}
{{- include "arbitrage.cacheEnvironment" $c }}
{{- end -}}

{{/* Who may call a model: names in certificates. */}}
{{- define "arbitrage.callers" -}}
{{ .components.orchestrator.host }}
{{- if and .root.Values.routerTraining.enabled (ne .c.name "router") -}}
,{{ include "arbitrage.fullname" .root }}-router-training.{{ .root.Release.Namespace }}.svc
{{- end -}}
{{- end -}}

{{/* Where model files are kept. Takes a component. */}}
{{- define "arbitrage.cacheEnvironment" -}}
{{- if ne .modelCache.mode "none" }}
- { name: HF_HOME, value: {{ .modelCache.mountPath }}/hub }
- { name: ARBITRAGE_MODEL_FILES, value: {{ .modelCache.mountPath }}/packs }
{{- end }}
{{- with .modelCache.tokenSecret }}
- name: HF_TOKEN
  valueFrom: { secretKeyRef: { name: {{ . }}, key: HF_TOKEN } }
{{- end }}
{{- end -}}

{{- define "arbitrage.engineEnvironment" -}}
{{- $engine := .c.engine }}
- { name: ARBITRAGE_ENGINE, value: {{ ternary "tgi" "openai" (and (eq $engine.kind "tgi") (ne $engine.mode "kserve")) }} }
- { name: ARBITRAGE_ENGINE_URL, value: {{ include "arbitrage.engineUrl" . | quote }} }
- { name: ARBITRAGE_ENGINE_PROMPT, value: {{ $engine.prompt }} }
{{- include "arbitrage.serverEnvironment" . }}
{{- end -}}

{{/* What is said of any server that speaks HTTP. */}}
{{- define "arbitrage.serverEnvironment" -}}
{{- $engine := .c.engine }}
{{- with $engine.tokenizer }}
- { name: ARBITRAGE_ENGINE_TOKENIZER, value: {{ . | quote }} }
{{- end }}
{{- with int $engine.maxContextTokens }}
- { name: ARBITRAGE_ENGINE_MAX_CONTEXT_TOKENS, value: {{ . | quote }} }
{{- end }}
{{- with coalesce $engine.revision (regexFind "[^@]*$" (ternary .c.model.reference "" (contains "@" .c.model.reference))) }}
- { name: ARBITRAGE_ENGINE_REVISION, value: {{ . | quote }} }
{{- end }}
{{- if $engine.apiKeySecret.name }}
- { name: ARBITRAGE_ENGINE_API_KEY_FILE, value: /etc/arbitrage/engine-key/{{ $engine.apiKeySecret.key }} }
{{- end }}
{{- if $engine.caSecret.name }}
- { name: ARBITRAGE_ENGINE_CA, value: /etc/arbitrage/engine-ca/{{ $engine.caSecret.key }} }
{{- end }}
{{- end -}}

{{/* A PRM or router whose model a server of the Open Inference Protocol runs, or a PRM's vLLM. */}}
{{- define "arbitrage.scorerEnvironment" -}}
{{- $engine := .c.engine }}
- { name: ARBITRAGE_ENGINE, value: {{ $engine.kind }} }
- { name: ARBITRAGE_ENGINE_URL, value: {{ $engine.url | quote }} }
{{- if eq $engine.kind "vllm" }}
{{- include "arbitrage.serverEnvironment" . }}
{{- else if $engine.caSecret.name }}
- { name: ARBITRAGE_ENGINE_CA, value: /etc/arbitrage/engine-ca/{{ $engine.caSecret.key }} }
{{- end }}
{{- if eq .c.name "router" }}
- { name: ARBITRAGE_ENGINE_ROUTER_JSON, value: /etc/arbitrage/router/router.json }
{{- end }}
{{- end -}}

{{- define "arbitrage.engineUrl" -}}
{{- if eq .c.engine.mode "external" -}}
{{ .c.engine.url }}
{{- else if eq .c.engine.mode "sidecar" -}}
http://127.0.0.1:{{ .c.engine.port }}
{{- else -}}
http://{{ include "arbitrage.fullname" .root }}-{{ .c.name }}-engine.{{ .root.Release.Namespace }}.svc:8080/openai
{{- end -}}
{{- end -}}

{{- define "arbitrage.gatewayEnvironment" }}
- { name: ARBITRAGE_ORCHESTRATOR_ADDRESS, value: {{ .components.orchestrator.reach | quote }} }
{{- if .root.Values.tls.enabled }}
- { name: ARBITRAGE_ORCHESTRATOR_TLS_CA, value: /etc/arbitrage/tls/ca.crt }
{{- else if .root.Values.auth.keysSecret }}
# Keys without TLS are what the values ask for.
- { name: ARBITRAGE_ALLOW_PLAINTEXT_KEYS, value: "true" }
{{- end }}
{{- end -}}

{{- define "arbitrage.orchestratorEnvironment" -}}
{{- range $name := list "draft" "target" "prm" "router" }}
{{- with (index $.components $name).reach }}
- { name: ARBITRAGE_{{ upper $name }}_ADDRESS, value: {{ . | quote }} }
{{- end }}
{{- end }}
{{- include "arbitrage.storeEnv" .root }}
{{- if .root.Values.tls.enabled }}
- { name: ARBITRAGE_MODELS_TLS_CA, value: /etc/arbitrage/tls/ca.crt }
- { name: ARBITRAGE_MODELS_TLS_CERTIFICATE, value: /etc/arbitrage/tls/tls.crt }
- { name: ARBITRAGE_MODELS_TLS_KEY, value: /etc/arbitrage/tls/tls.key }
{{- end }}
{{- if .root.Values.auth.keysSecret }}
- { name: ARBITRAGE_API_KEYS_FILE, value: /etc/arbitrage/keys/{{ .root.Values.auth.keysKey }} }
{{- end }}
{{- end -}}
