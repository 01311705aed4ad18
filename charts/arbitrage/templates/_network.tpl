{{/* Peers and ports of NetworkPolicies. */}}

{{/* Pods of a component, as the peers of a rule. Takes root and names. */}}
{{- define "arbitrage.peers" -}}
{{- range .names }}
- podSelector:
    matchLabels:
      {{- include "arbitrage.selector" (dict "root" $.root "name" .) | nindent 6 }}
{{- end }}
{{- end -}}

{{/* Egress to the DNS. */}}
{{- define "arbitrage.dnsRule" -}}
- to:
    {{- toYaml .Values.networkPolicy.dns.to | nindent 4 }}
  ports:
    {{- range .Values.networkPolicy.dns.ports }}
    - { protocol: UDP, port: {{ int . }} }
    - { protocol: TCP, port: {{ int . }} }
    {{- end }}
{{- end -}}

{{/* Egress to pods of the release. Takes root, name and port. */}}
{{- define "arbitrage.insideRule" -}}
- to:
    {{- include "arbitrage.peers" (dict "root" .root "names" (list .name)) | nindent 4 }}
  ports:
    - { protocol: TCP, port: {{ int .port }} }
{{- end -}}

{{/* Egress to what is outside of the release. Takes root and ports. */}}
{{- define "arbitrage.outsideRule" -}}
- ports:
    {{- range .ports }}
    - { protocol: TCP, port: {{ int . }} }
    {{- end }}
  {{- with .root.Values.networkPolicy.externalTo }}
  to:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end -}}

{{/* Port of a URL, or of host:port. */}}
{{- define "arbitrage.portOf" -}}
{{- $port := regexFind ":[0-9]+$" (regexReplaceAll "^([a-z+]+://)?([^/?]*).*$" . "${2}") -}}
{{- if $port -}}{{ trimPrefix ":" $port }}{{- else if hasPrefix "http://" . -}}80{{- else -}}443{{- end -}}
{{- end -}}

{{/* Egress to what runs elsewhere, at one address or several. Takes root and address. */}}
{{- define "arbitrage.addressRule" -}}
{{- $ports := list -}}
{{- range splitList "," .address }}{{ $ports = append $ports (include "arbitrage.portOf" .) }}{{ end -}}
{{ include "arbitrage.outsideRule" (dict "root" .root "ports" (uniq $ports)) }}
{{- end -}}

{{/* Egress of a model to its engine, its files and its collector. Takes root and c. */}}
{{- define "arbitrage.modelEgress" -}}
{{- $c := .c -}}
{{- $mode := $c.engine.mode -}}
{{- if eq $mode "kserve" }}
{{ include "arbitrage.insideRule" (dict "root" .root "name" (printf "%s-engine" $c.name) "port" 8080) }}
{{- else if eq $mode "external" }}
{{ include "arbitrage.outsideRule" (dict "root" .root "ports" (list (include "arbitrage.portOf" $c.engine.url))) }}
{{- end }}
{{- $files := list $c.engine.tokenizer (ternary $c.model.reference "" (has $mode (list "inProcess" "sidecar"))) }}
{{- if or (eq "true" (include "arbitrage.isRemote" (index $files 0))) (eq "true" (include "arbitrage.isRemote" (index $files 1))) (and $c.modelCache.pull (eq $c.modelCache.mode "emptyDir")) }}
{{ include "arbitrage.outsideRule" (dict "root" .root "ports" (list 443)) }}
{{- end }}
{{- end -}}

{{/* Egress of the orchestrator to models, Redis. Takes root and components. */}}
{{- define "arbitrage.orchestratorEgress" -}}
{{- $root := .root -}}
{{- range $name := list "draft" "target" "prm" "router" }}
{{- $c := index $.components $name }}
{{- if $c.isDeployed }}
{{ include "arbitrage.insideRule" (dict "root" $root "name" $name "port" $c.service.port) }}
{{- else if $c.reach }}
{{ include "arbitrage.addressRule" (dict "root" $root "address" $c.address) }}
{{- end }}
{{- end }}
{{- include "arbitrage.redisEgress" $root }}
{{- end -}}

{{- define "arbitrage.redisEgress" -}}
{{- if eq .Values.redis.mode "bundled" }}
{{ include "arbitrage.insideRule" (dict "root" . "name" "redis" "port" 6379) }}
{{- else if eq .Values.redis.mode "external" }}
{{ include "arbitrage.outsideRule" (dict "root" . "ports" .Values.redis.external.ports) }}
{{- end }}
{{- end -}}
