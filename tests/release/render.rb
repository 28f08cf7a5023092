# Renders one ERB template of a job: render.rb JOB_FOLDER TEMPLATE PROPERTIES.yml
#
# What a template may use of BOSH is little, and this offers no more: `p` and `if_p` on properties that the job's spec
# names. Asking for one it does not name is an error here, where BOSH would quietly find nothing.
require 'erb'
require 'yaml'

class Template
  def initialize(spec, properties)
    @values = spec.fetch('properties').to_h do |name, property|
      given = name.split('.').reduce(properties) { |at, key| at.is_a?(Hash) ? at[key] : nil }
      [name, given.nil? ? property['default'] : given]
    end
  end

  def p(names, *default)
    found = Array(names).map { |name| @values.fetch(name) }.compact
    return found.first unless found.empty?

    default.fetch(0) { raise "no property #{Array(names).join(' or ')}" }
  end

  def if_p(*names)
    found = names.map { |name| @values.fetch(name) }
    yield(*found) unless found.any?(&:nil?)
  end

  def render(source) = ERB.new(source, trim_mode: '-').result(binding)
end

job, template, properties = ARGV
spec = YAML.load_file("#{job}/spec")
puts Template.new(spec, YAML.load_file(properties) || {}).render(File.read("#{job}/templates/#{template}"))
