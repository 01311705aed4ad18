{{/* What things are called. */}}

{{/*
The beginning of every object's name. A CronJob's may have 52 characters, of which what comes behind
takes 24. One that is cut has a digest in it, so that no two releases have the same.
*/}}
{{- define "arbitrage.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- $full := printf "%s-%s" .Release.Name $name -}}
{{- if .Values.fullnameOverride -}}
{{- $full = .Values.fullnameOverride -}}
{{- else if contains $name .Release.Name -}}
{{- $full = .Release.Name -}}
{{- end -}}
{{- if gt (len $full) 28 -}}
{{- printf "%s-%s" ($full | trunc 21 | trimSuffix "-") (sha256sum $full | trunc 6) -}}
{{- else -}}
{{- $full -}}
{{- end -}}
{{- end -}}

{{/* What selects a component's pods. Takes root and name. */}}
{{- define "arbitrage.selector" -}}
app.kubernetes.io/name: arbitrage
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .name }}
{{- end -}}

{{/* Labels that the user gives: those of one object before those of all. Takes root and own. */}}
{{- define "arbitrage.ownLabels" -}}
{{- with merge dict (default dict .own) .root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Labels of an object of a component. Takes root and name, and own where it has some. */}}
{{- define "arbitrage.labels" -}}
{{ include "arbitrage.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ .root.Chart.Name }}-{{ .root.Chart.Version }}
{{- include "arbitrage.ownLabels" . }}
{{- end -}}

{{/*
Labels of a pod. Without versions: a chart that is newer and says the same must not restart models.
Takes root and name, and own where it has some.
*/}}
{{- define "arbitrage.podLabels" -}}
{{ include "arbitrage.selector" . }}
{{- include "arbitrage.ownLabels" . }}
{{- end -}}

{{/*
metadata of a component's object. Takes root, name, suffix where it has several of a kind, and own
where it has labels of its own.
*/}}
{{- define "arbitrage.metadata" -}}
name: {{ include "arbitrage.fullname" .root }}-{{ .name }}{{ .suffix }}
namespace: {{ .root.Release.Namespace }}
labels:
  {{- include "arbitrage.labels" . | nindent 2 }}
{{- end -}}

{{/* An image. Takes root, image, and default: the name it has otherwise. */}}
{{- define "arbitrage.image" -}}
{{- $common := .root.Values.image -}}
{{- $registry := default $common.registry .image.registry -}}
{{- $name := printf "%s%s" (ternary (printf "%s/" $registry) "" (ne $registry "")) (default .default .image.repository) -}}
{{- if .image.digest -}}
{{- printf "%s@%s" $name .image.digest -}}
{{- else -}}
{{- printf "%s:%s" $name (coalesce .image.tag $common.tag .root.Chart.AppVersion) -}}
{{- end -}}
{{- end -}}
