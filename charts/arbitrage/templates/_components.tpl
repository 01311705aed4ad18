{{/*
What the components are. A component is a name, a row here, and a block of values: what its block
leaves out is as `defaults` has it.
*/}}

{{- define "arbitrage.programs" -}}
orchestrator: { module: services.orchestrator, health: arbitrage.v1.OrchestratorService, image: orchestrator }
draft: { module: services.generator, health: arbitrage.v1.GeneratorService, image: generator }
target: { module: services.generator, health: arbitrage.v1.GeneratorService, image: generator }
prm: { module: services.prm, health: arbitrage.v1.PrmService, image: prm }
router: { module: services.router, health: arbitrage.v1.RouterService, image: router }
gateway: { module: services.gateway, image: gateway }
{{- end -}}

{{/* Every component by name: its values, and name, program, isModel, isHttp, isDeployed, host and reach. */}}
{{- define "arbitrage.components" -}}
{{- $root := . -}}
{{- range $name, $program := fromYaml (include "arbitrage.programs" .) }}
{{- $c := mergeOverwrite (deepCopy $root.Values.defaults) (deepCopy (index $root.Values $name)) }}
{{- $host := printf "%s-%s.%s.svc" (include "arbitrage.fullname" $root) $name $root.Release.Namespace }}
{{- $own := printf "%s:%d" $host (int $c.service.port) }}
{{- $_ := set $c "name" $name }}
{{- $_ := set $c "program" $program }}
{{- $_ := set $c "isModel" (not (has $name (list "orchestrator" "gateway"))) }}
{{- $_ := set $c "isHttp" (eq $name "gateway") }}
{{- $_ := set $c "isDeployed" (and $c.enabled (not $c.address)) }}
{{- $_ := set $c "host" $host }}
{{- $_ := set $c "reach" (ternary (default $own $c.address) "" $c.enabled) }}
{{ $name }}:
  {{- toYaml $c | nindent 2 }}
{{- end }}
{{- end -}}

{{/* Those of them that are deployed. */}}
{{- define "arbitrage.deployed" -}}
{{- range $name, $c := fromYaml (include "arbitrage.components" .) }}
{{- if $c.isDeployed }}
{{ $name }}:
  {{- toYaml $c | nindent 2 }}
{{- end }}
{{- end }}
{{- end -}}

{{/* "true" where more than one pod of a component may be there. */}}
{{- define "arbitrage.isPlural" -}}
{{- if eq .autoscaling.mode "none" }}{{ gt (int .replicas) 1 }}{{ else }}{{ gt (int .autoscaling.maxReplicas) 1 }}{{ end }}
{{- end -}}

{{/* "true" where files come from outside: a reference with a slash that is no path. */}}
{{- define "arbitrage.isRemote" -}}
{{- regexMatch "^[^/.].*/" . -}}
{{- end -}}

{{/* The Secret with a component's certificate. Takes root and name. */}}
{{- define "arbitrage.tlsSecret" -}}
{{- if .root.Values.tls.certManager.enabled -}}
{{ include "arbitrage.fullname" .root }}-{{ .name }}-tls
{{- else -}}
{{ index .root.Values.tls.secrets .name }}
{{- end -}}
{{- end -}}

{{/* Redis as ARBITRAGE_STORE_URL, as entries of an environment. */}}
{{- define "arbitrage.storeEnv" -}}
{{- $redis := .Values.redis -}}
{{- if eq $redis.mode "bundled" }}
{{- with $redis.bundled.passwordSecret }}
{{- if .name }}
- name: REDIS_PASSWORD
  valueFrom: { secretKeyRef: { name: {{ .name }}, key: {{ .key }} } }
{{- end }}
- name: ARBITRAGE_STORE_URL
  value: redis://{{ if .name }}:$(REDIS_PASSWORD)@{{ end }}{{ include "arbitrage.fullname" $ }}-redis.{{ $.Release.Namespace }}.svc:6379
{{- end }}
{{- else if eq $redis.mode "external" }}
- name: ARBITRAGE_STORE_URL
  {{- if $redis.external.urlSecret.name }}
  valueFrom: { secretKeyRef: { name: {{ $redis.external.urlSecret.name }}, key: {{ $redis.external.urlSecret.key }} } }
  {{- else }}
  value: {{ $redis.external.url | quote }}
  {{- end }}
{{- end }}
{{- end -}}

{{/* The policy by which a deployment is tried: it needs no model that may be left out. Takes components. */}}
{{- define "arbitrage.policy" -}}
{{ ternary "arbitrage" "draft_only" (ne .router.reach "") }}
{{- end -}}
