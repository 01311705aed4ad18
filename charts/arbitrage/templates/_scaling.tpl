{{/*
What autoscalers go by. It is asked of the orchestrators, in front of what is scaled: it is there
while no replica is, and rises before one is busy. Each query gives one series: a sum.
*/}}

{{/* Pins a query to this release. Takes root. */}}
{{- define "arbitrage.pin" -}}
{namespace="{{ .Release.Namespace }}",{{ .Values.metrics.releaseLabel }}="{{ .Release.Name }}"}
{{- end -}}

{{/* What a component is wanted for now, in steps or solutions. Takes root and name. */}}
{{- define "arbitrage.loadQuery" -}}
{{- $pin := include "arbitrage.pin" .root -}}
{{- if eq .name "target" -}}
sum(arbitrage_target_inflight_steps{{ $pin }}) + sum(arbitrage_target_queue_depth{{ $pin }})
{{- else -}}
sum(arbitrage_solutions_running{{ $pin }}) + sum(arbitrage_solutions_waiting{{ $pin }})
{{- end -}}
{{- end -}}

{{/* Seconds of the target's work that come in each second: steps that it would write at once. */}}
{{- define "arbitrage.demandQuery" -}}
sum(arbitrage_target_demand_seconds{{ include "arbitrage.pin" . }})
{{- end -}}

{{/* Each query of a component, by what its metric is called. Takes root and name. */}}
{{- define "arbitrage.queries" -}}
{{ .name }}_load: {{ include "arbitrage.loadQuery" . | quote }}
{{- if eq .name "target" }}
target_demand: {{ include "arbitrage.demandQuery" .root | quote }}
{{- end }}
{{- end -}}
