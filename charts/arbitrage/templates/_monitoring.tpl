{{/* Labels that queries go by, whatever the names of Services are. Takes root and name. */}}
{{- define "arbitrage.relabelings" -}}
- { action: replace, targetLabel: {{ .root.Values.metrics.releaseLabel }}, replacement: {{ .root.Release.Name | quote }} }
- { action: replace, targetLabel: component, replacement: {{ .name }} }
{{- end -}}

{{/* An alert's annotations. Takes root, name, summary and description. */}}
{{- define "arbitrage.annotations" -}}
summary: {{ .summary | quote }}
description: {{ .description | quote }}
runbook_url: {{ .root.Values.metrics.prometheusRule.runbookUrl }}#{{ lower .name }}
{{- end -}}
